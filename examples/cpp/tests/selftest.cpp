#include "core/selftest.h"

#include <cmath>

#include "samples.h"

using namespace mdtrt;
using Floats = std::vector<float>;

static Floats counted(int from, int count) {
    Floats values;
    for (int i = from; i < from + count; ++i) values.push_back(static_cast<float>(i % 251));
    return values;
}

// tests/cpp compares all ops over several sizes with Python's.
TEST_CASE("operands count up over the ranks, modulo 251") {
    CHECK(operand(2, 0) == counted(0, 16));
    CHECK(operand(2, 1) == counted(16, 16));
    CHECK(operand(6, 5) == counted(240, 48));
    CHECK(operand(6, 5)[11] == 0);
}

TEST_CASE("what a rank must get of each op") {
    CHECK(expected("all_gather", 2, 1) == counted(0, 32));
    CHECK(expected("broadcast", 2, 1) == counted(0, 16));
    Floats exchanged = counted(8, 8), second = counted(24, 8);
    exchanged.insert(exchanged.end(), second.begin(), second.end());
    CHECK(expected("all_to_all", 2, 1) == exchanged);
    CHECK(expected("all_reduce", 2, 1)[15] == 15 + 31);
    CHECK(expected("reduce_scatter", 2, 1) == Floats{32, 34, 36, 38, 40, 42, 44, 46});
}

TEST_CASE("a wrong result is named, with the first element that differs") {
    Segment test = parse_manifest(sample("engines"), "m").self_tests.at(0);
    REQUIRE(test.collectives[0].op == "all_gather");
    auto verdict = [&](const Floats& result) {
        return raised([&] {
            if (auto error = judge(test, result, 1, "TensorRT-RTX 1.6.1.120")) throw *error;
        });
    };
    CHECK(verdict(counted(0, 32)).empty());
    Floats alone = counted(16, 16); // as of a communicator that is ignored: only its own part is there
    alone.resize(32, std::nanf(""));
    CHECK_SAYS(verdict(alone), "LaunchError: TensorRT-RTX 1.6.1.120 computes all_gather wrong on these GPUs");
    CHECK_SAYS(verdict(alone), "over the 2 ranks of axis 'cp', element 0 on the rank at 1 is 16 and must be 0");
    CHECK_SAYS(verdict(alone), "ignores the communicator");
    CHECK_SAYS(verdict(Floats(32, std::nanf(""))), "element 0 on the rank at 1 is nan and must be 0");
    Floats last = counted(0, 32);
    last[31] = std::nanf("");
    CHECK_SAYS(verdict(last), "element 31");
}

static std::string refusal(const Manifest& manifest) {
    return raised([&] { check_self_tests(manifest); });
}

TEST_CASE("the self-tests are those that the engines ask for, and no others") {
    Manifest whole = parse_manifest(sample("two_axes"), "m");
    REQUIRE(whole.self_tests.size() == 2); // all_reduce on dp, all_gather on tp
    CHECK(refusal(whole).empty());
    Manifest other = whole;
    other.self_tests.pop_back();
    CHECK_SAYS(refusal(other), "has 1 self-tests, and its engines ask for 2; the first that differs is 'the self-test");
    other = whole;
    other.self_tests.push_back(other.self_tests[0]);
    CHECK_SAYS(refusal(other), "has 3 self-tests, and its engines ask for 2");
    other = whole;
    other.self_tests[1] = other.self_tests[0];
    CHECK_SAYS(refusal(other), "has 2 self-tests, and its engines ask for 2");
    other = whole;
    other.self_tests[0].file = "engines/other.engine";
    CHECK_SAYS(refusal(other), "which is not among the manifest's files");
    other = whole;
    other.ranks[3][1].collectives[0].op = "permute_tensor";
    CHECK_SAYS(refusal(other), "an engine has a permute_tensor in bfloat16, which engines do not have");
    other.ranks[3][1].collectives[0] = {"ring_attention", "dp", 2, dtype_of("float64"), 8, 8};
    CHECK_SAYS(refusal(other), "an engine has a ring_attention in float64");
    other.ranks[3][1].collectives[0].dtype = dtype_of("float16");
    CHECK_SAYS(refusal(other), "the self-test of ring_attention in float16 on axis");
}

TEST_CASE("a self-test is of the form that the schema gives it, in every part") {
    Manifest whole = parse_manifest(sample("two_axes"), "m");
    for (auto change : std::vector<void (*)(Segment&)>{
             [](Segment& t) { t.runs = "eager"; },
             [](Segment& t) { t.axis.reset(); },
             [](Segment& t) { t.axis = *t.axis == "dp" ? "tp" : "dp"; },
             [](Segment& t) { t.inputs[0].name = "z"; },
             [](Segment& t) { t.inputs[0].source.name = "z"; },
             [](Segment& t) { t.inputs[0].source.kind = "value"; },
             [](Segment& t) { t.inputs[0].dtype = dtype_of("float16"); },
             [](Segment& t) { t.inputs[0].shape[1] = 16; },
             [](Segment& t) { t.inputs[0].transposed = true; },
             [](Segment& t) { t.inputs.push_back(t.inputs[0]); },
             [](Segment& t) { t.outputs.clear(); },
             [](Segment& t) { t.outputs[0].shape[0] += 1; },
             [](Segment& t) { t.collectives.clear(); },
             [](Segment& t) { t.collectives[0].op = "broadcast"; },
             [](Segment& t) { t.collectives[0].ranks = 4; },
             [](Segment& t) { t.collectives[0].bytes_sent += 1; },
         }) {
        Manifest other = whole;
        change(other.self_tests[1]);
        CHECK_SAYS(refusal(other), "is not of the form that schema 4 gives it");
    }
}
