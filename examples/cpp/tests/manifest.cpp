#include "core/manifest.h"

#include "core/guard.h"
#include "core/sha256.h"
#include "samples.h"

using namespace mdtrt;

static std::string refusal(const std::string& text) {
    return raised([&] { parse_manifest(text, "m"); });
}

// The refusal of a sample in which a text was replaced.
static std::string changed(const std::string& name, const std::string& from, const std::string& to) {
    return refusal(replaced(sample(name), from, to));
}

TEST_CASE("the samples are read as they are") {
    Manifest manifest = parse_manifest(sample("two_axes"), "m");
    CHECK(manifest.mesh.text() == "Mesh(dp=2, tp=2)");
    CHECK(manifest.digest == sha256(sample("two_axes")));
    CHECK(manifest.ranks.size() == 4);
    const Segment& first = manifest.ranks[3][0];
    CHECK(first.axis == "tp");
    CHECK(first.name == "up");
    CHECK(first.inputs[1].transposed);
    CHECK(first.inputs[1].source_shape() == Shape{16, 8});
    CHECK(first.inputs[0].dtype == dtype_of("bfloat16"));
    CHECK(first.collectives[0].elements == 96);
    CHECK(!manifest.ranks[3][2].axis);
    CHECK(local_shape(manifest.inputs[0], manifest.mesh) == Shape{2, 3, 8});
    CHECK(manifest.versions.tensorrt == "1.6.1.120");
    CHECK(manifest.weights[2].has_value());
    CHECK(refusal(sample("engines")).empty());
    CHECK(refusal(sample("parts")).empty());
}

TEST_CASE("ranks are row-major, in the order of the axes") {
    Mesh mesh{{{"b", 2}, {"a", 3}}};
    CHECK(mesh.coordinate(4, 0) == 1);
    CHECK(mesh.coordinate(4, 1) == 1);
    CHECK(mesh.group(4, 0) == std::vector<int>{1, 4});
    CHECK(mesh.group(4, 1) == std::vector<int>{3, 4, 5});
    // The order is that of the file, not of the alphabet.
    Manifest turned = parse_manifest(sample("engines"), "m");
    CHECK(turned.mesh.axes[0].first == "cp");
}

TEST_CASE("another schema, a missing field and one that is not known are refused") {
    CHECK_SAYS(changed("engines", "\"schema\": 4", "\"schema\": 99"), "schema 99 and this runner reads schema 4");
    CHECK_SAYS(changed("engines", "\"schema\": 4", "\"schema\": true"), "is not a bundle's manifest");
    CHECK_SAYS(changed("engines", "\"placement\"", "\"replacement\""), "'placement' is missing");
    CHECK_SAYS(changed("engines", "\"schema\": 4,", "\"schema\": 4, \"more\": 1,"), "'more' is not known");
    CHECK_SAYS(changed("engines", "\"dtype\": \"float32\"", "\"dtype\": \"float99\""), "'float99' is not known");
    CHECK_SAYS(changed("engines", "\"coordinate\"", "\"pigeon\""), "'pigeon' is not known");
    CHECK_SAYS(refusal("[]"), "is not a bundle's manifest");
    CHECK_SAYS(refusal(""), "is not a bundle's manifest");
}

TEST_CASE("a manifest that contradicts itself is refused, naming both sides") {
    CHECK_SAYS(changed("engines", "\"cp\": 2", "\"cp\": 4"), "segments for 2 ranks");
    CHECK_SAYS(changed("engines", "\"cp\": 2", "\"cp\": 0"), "axis 'cp' has size 0");
    CHECK_SAYS(changed("engines", "\"cp\": 2", "\"cp\": 4611686018427387904"), "more than 4096 ranks");
    CHECK_SAYS(changed("engines", "\"cp\": 2", "\"c p\": 2"), "no name of an axis");
    CHECK_SAYS(changed("engines", "\"placement\": \"engine\"", "\"placement\": \"nowhere\""), "placement is 'nowhere'");
    CHECK_SAYS(changed("engines", "\"transport\": \"nccl\"", "\"transport\": \"bird\""), "transport is 'bird'");
    CHECK_SAYS(changed("engines", "\"axis\": \"cp\"", "\"axis\": \"tp\""), "communicates on axis 'tp'");
    CHECK_SAYS(changed("engines", "\"op\": \"all_gather\"", "\"op\": \"shout\""), "the collective 'shout'");
    CHECK_SAYS(changed("engines", "\"elements\": 16", "\"elements\": 8"), "would wait for each other");
    CHECK_SAYS(changed("engines", "\"ranks\": 2", "\"ranks\": 3"), "over 3 ranks of axis 'cp'");
    CHECK_SAYS(changed("engines", "\"bytes_sent\": 32", "\"bytes_sent\": -1"), "sends -1 bytes");
    CHECK_SAYS(changed("engines", "\"output\": 0", "\"output\": 1"), "result has a part that is not understood");
    CHECK_SAYS(changed("engines", "\"files\": {", "\"files\": {\"../x\": \"0\","), "not inside the bundle");
    CHECK_SAYS(changed("parts", "\"transposed\": true", "\"transposed\": false"), "and it is float32 [8, 16]");
}

TEST_CASE("what only Python runs is refused, and says how to export what runs") {
    Manifest parts = parse_manifest(sample("parts"), "m");
    CHECK_SAYS(raised([&] { check_runnable(parts); }), "runs as eager, and this runner has no PyTorch");
    CHECK_SAYS(raised([&] { check_runnable(parts); }), "compute=\"tensorrt\"");
    Manifest engines = parse_manifest(sample("engines"), "m");
    CHECK(raised([&] { check_runnable(engines); }).empty());
    engines.ranks[1][0].collectives[0].op = "ring_attention";
    CHECK_SAYS(raised([&] { check_runnable(engines); }), "ring attention");
    Manifest given = parse_manifest(sample("given"), "m");
    CHECK_SAYS(raised([&] { check_runnable(given); }), "lacks 3 weights of its model, 'q' first");
    CHECK_SAYS(raised([&] { check_runnable(given); }), "export the bundle again with its weights");
    given.given.clear();
    CHECK(raised([&] { check_runnable(given); }).empty());
}

TEST_CASE("weights that are given at load fit what segments take") {
    Manifest given = parse_manifest(sample("given"), "m");
    CHECK(given.joined.at("q+k") == std::vector<std::string>{"q", "k"});
    CHECK_SAYS(changed("given", "\"name\": \"k\"", "\"name\": \"q\""), "more than one weight 'q'");
    CHECK_SAYS(changed("given", "\"name\": \"k\"", "\"name\": \"q+k\""), "more than one weight 'q+k'");
    CHECK_SAYS(changed("given", "\"name\": \"k\"", "\"name\": \"l\""), "joins the weight 'q+k' of others");
    CHECK_SAYS(changed("given", "\"q+k\": [", "\"q+k\": [\"out\", "), "joins the weight 'q+k' of others");
    CHECK_SAYS(changed("given", "\"q+k\": [", "\"none\": [], \"q+k\": ["), "joins the weight 'none' of others");
    CHECK_SAYS(changed("given", "\"q+k\": [", "\"q+k\": [\"q\", "), "and it is float32 [10, 8]");
    CHECK_SAYS(changed("given", "\"q+k\": [", "\"q+q\": ["), "has no file of weights");
    CHECK_SAYS(changed("given", "\"joined\": {", "\"joined\": {\"a\": 1,"), "$.joined");
}

TEST_CASE("an engine of another TensorRT is refused, by flavour and by all four numbers") {
    Manifest manifest = parse_manifest(sample("engines"), "m");
    CHECK(raised([&] { check_versions(manifest, {"TensorRT-RTX", 1, 6, 1, 120}); }).empty());
    for (const Flavour& other : {Flavour{"TensorRT", 1, 6, 1, 120},
                                 {"TensorRT-RTX", 1, 6, 1, 121},
                                 {"TensorRT-RTX", 1, 6, 2, 120},
                                 {"TensorRT-RTX", 1, 5, 1, 120},
                                 {"TensorRT-RTX", 2, 6, 1, 120}})
        CHECK_SAYS(raised([&] { check_versions(manifest, other); }),
                   "this program is for " + other.name + " " + other.version());
}

TEST_CASE("a bundle that is not there is refused") {
    Folder folder;
    CHECK_SAYS(raised([&] { read_manifest(folder.path); }), "there is no bundle at");
    folder.write("manifest.json", sample("engines"));
    CHECK(read_manifest(folder.path).ranks.size() == 2);
}
