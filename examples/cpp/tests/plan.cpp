#include "core/plan.h"

#include "samples.h"

using namespace mdtrt;

static Binding bound(const char* kind, const char* name, int64_t elements) {
    return {name, {kind, name}, dtype_of("float32"), {elements}, false};
}

TEST_CASE("everything that a segment touches has a place, and what lives at once does not overlap") {
    Manifest manifest = parse_manifest(sample("two_axes"), "m");
    Plan plan = plan_memory(manifest, 1);
    CHECK(plan.places.size() == 7); // two coordinates, x, y, z, a, b
    CHECK(plan.weights.size() == 2);
    CHECK(plan.weights.at({"up", true}).bytes == 256);
    for (const auto& segment : manifest.ranks[1]) {
        std::vector<Place> used;
        for (const auto* bindings : {&segment.inputs, &segment.outputs})
            for (const Binding& binding : *bindings) used.push_back(plan.of(binding));
        for (const Place& a : used) {
            CHECK(a.offset % kAlignment == 0);
            CHECK(a.offset + a.bytes <= plan.bytes);
            for (const Place& b : used)
                CHECK((&a == &b || a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset));
        }
    }
}

TEST_CASE("values whose readers are done give their memory to later ones") {
    Manifest manifest;
    manifest.mesh = Mesh{{{"cp", 1}}};
    auto segment = [](std::vector<Binding> in, std::vector<Binding> out) {
        return Segment{"engine", "e", {}, in, out, {}, ""};
    };
    manifest.ranks = {{segment({}, {bound("value", "a", 1000)}),
                       segment({bound("value", "a", 1000)}, {bound("value", "b", 1000)}),
                       segment({bound("value", "b", 1000)}, {bound("value", "c", 900)}),
                       segment({bound("value", "c", 900), bound("value", "b", 1000)}, {bound("value", "d", 1000)})}};
    manifest.weights = {std::nullopt};
    Plan plan = plan_memory(manifest, 0);
    auto at = [&](const char* name) { return plan.places.at({"value", name}).offset; };
    CHECK(at("a") != at("b"));
    CHECK(at("c") == at("a"));
    CHECK(at("d") != at("b")); // which its own segment reads
    CHECK(at("d") != at("c"));
    CHECK(plan.bytes == 512 + 3 * 4096);
}

TEST_CASE("an empty tensor has an address, too") {
    Manifest manifest;
    manifest.mesh = Mesh{{{"cp", 1}}};
    manifest.outputs = {{"y", {0, 4}, dtype_of("float32"), {}}, {"z", {4}, dtype_of("float32"), {}}};
    manifest.ranks = {{}};
    Plan plan = plan_memory(manifest, 0);
    CHECK(plan.places.at({"output", "y"}).bytes == 0);
    CHECK(plan.places.at({"output", "y"}).offset != plan.places.at({"output", "z"}).offset);
}

TEST_CASE("an engine whose tensors are not the segment's is refused, naming both sides") {
    Segment segment{"engine", "e", {}, {bound("input", "x", 4)}, {bound("output", "y", 8)}, {}, ""};
    std::vector<Io> right = {{"y", false, "float32", {8}}, {"x", true, "float32", {4}}};
    auto refusal = [&](std::vector<Io> found) { return raised([&] { check_io(found, segment, "segment 0 (e)"); }); };
    CHECK(refusal(right).empty());
    auto wrong = right;
    wrong[0].shape = {9};
    CHECK_SAYS(refusal(wrong), "output 'y' float32 [9] and the manifest has output 'y' float32 [8]");
    wrong = right;
    wrong[1].dtype = "bfloat16";
    CHECK_SAYS(refusal(wrong), "input 'x' bfloat16 [4] and the manifest has input 'x' float32 [4]");
    wrong = right;
    wrong[1].is_input = false;
    CHECK_SAYS(refusal(wrong), "output 'x'");
    wrong = right;
    wrong.push_back({"extra", true, "int32", {1}});
    CHECK_SAYS(refusal(wrong), "input 'extra' int32 [1] and the manifest has no 'extra'");
    CHECK_SAYS(refusal({right[0]}), "has no 'x' and the manifest has");
}
