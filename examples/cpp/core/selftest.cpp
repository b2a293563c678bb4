#include "core/selftest.h"

#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "core/text.h"

namespace mdtrt {
namespace {

constexpr int64_t kWidth = 8;     // elements of each chunk of dim 0
constexpr int64_t kModulus = 251; // the sum of any 4096 operands is exact in float32
constexpr int64_t kRoot = 0;      // of ops that have one
const char* const kRing = "ring_attention";
const Shape kRingShape = {1, 8, 256, 128}; // of q, k and v: heads, tokens of each rank, head_dim

struct Op {
    int64_t rows;  // of the result, for P ranks: 1, P, or P * P
    int64_t bytes; // that a rank sends
};

std::optional<Op> op_of(const std::string& name, int64_t ranks, int64_t bytes) {
    int64_t all = ranks * ranks, others = ranks - 1;
    if (name == "all_reduce") return Op{ranks, 2 * bytes * others / ranks};
    if (name == "all_to_all") return Op{ranks, bytes * others / ranks};
    if (name == "broadcast") return Op{ranks, bytes};
    if (name == "all_gather") return Op{all, bytes * others};
    if (name == "reduce_scatter") return Op{1, bytes * others / ranks};
    return std::nullopt;
}

Binding bound(const char* kind, const char* name, DType dtype, const Shape& shape) {
    return {name, {kind, name}, dtype, shape, false};
}

// The self-test of one op, without its file; nothing where engines do not have that op in that dtype.
std::optional<Segment> self_test(const Collective& c) {
    Segment test;
    test.runs = "engine";
    test.axis = c.axis;
    DType dtype = dtype_of("float32");
    int64_t elements = c.ranks * kWidth, sent = 0;
    if (c.op == kRing) {
        dtype = c.dtype;
        if (dtype != dtype_of("float16") && dtype != dtype_of("bfloat16")) return std::nullopt;
        for (const char* name : {"q", "k", "v"}) test.inputs.push_back(bound("input", name, dtype, kRingShape));
        test.outputs = {bound("output", "y", dtype, kRingShape)};
        elements = 2 * elements_of(kRingShape); // keys and values
        sent = elements * dtype->itemsize * (c.ranks - 1);
    } else {
        auto op = op_of(c.op, c.ranks, elements * dtype->itemsize);
        if (!op) return std::nullopt;
        test.inputs = {bound("input", "x", dtype, {c.ranks, kWidth})};
        test.outputs = {bound("output", "y", dtype, {op->rows, kWidth})};
        sent = op->bytes;
    }
    test.collectives = {{c.op, c.axis, c.ranks, dtype, elements, sent}};
    test.name = "the self-test of " + c.op + " in " + std::string(dtype->name) + " on axis '" + c.axis + "'";
    return test;
}

Error refused(const std::string& problem) {
    return bundle_error(problem, "export the bundle again; do not edit manifest.json by hand");
}

// The first name of either side that the other lacks.
std::string first_other(const std::multiset<std::string>& found, const std::map<std::string, Segment>& wanted) {
    for (const auto& name : found)
        if (!wanted.count(name) || found.count(name) > 1) return in_quotes(name);
    for (const auto& [name, test] : wanted)
        if (!found.count(name)) return in_quotes(name);
    return "none";
}

} // namespace

void check_self_tests(const Manifest& manifest) {
    std::set<std::tuple<std::string, std::string, DType>> seen; // one axis has one number of ranks
    std::map<std::string, Segment> wanted;
    for (const auto& segments : manifest.ranks)
        for (const Segment& segment : segments) {
            if (segment.runs != "engine") continue;
            for (const Collective& c : segment.collectives) {
                if (!seen.emplace(c.axis, c.op, c.dtype).second) continue;
                auto test = self_test(c);
                if (!test)
                    throw refused("an engine has a " + c.op + " in " + std::string(c.dtype->name) +
                                  ", which engines do not have");
                wanted[test->name] = *test;
            }
        }
    std::multiset<std::string> names;
    for (const Segment& test : manifest.self_tests) names.insert(test.name);
    bool same = names.size() == wanted.size();
    for (const auto& test : wanted) same = same && names.count(test.first);
    if (!same)
        throw refused("the manifest has " + std::to_string(names.size()) + " self-tests, and its engines ask for " +
                      std::to_string(wanted.size()) + "; the first that differs is " + first_other(names, wanted));
    for (const Segment& test : manifest.self_tests) {
        if (!manifest.files.count(test.file))
            throw refused(in_quotes(test.name) + " runs " + in_quotes(test.file) +
                          ", which is not among the manifest's files");
        const Segment& form = wanted.at(test.name);
        if (std::tie(test.runs, test.axis, test.inputs, test.outputs, test.collectives) !=
            std::tie(form.runs, form.axis, form.inputs, form.outputs, form.collectives))
            throw refused(in_quotes(test.name) + " is not of the form that schema " + std::to_string(kSchema) +
                          " gives it");
    }
}

std::vector<float> operand(int64_t ranks, int64_t place) {
    int64_t count = ranks * kWidth;
    std::vector<float> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>((count * place + i) % kModulus);
    return values;
}

std::vector<float> expected(const std::string& op, int64_t ranks, int64_t place) {
    int64_t count = ranks * kWidth;
    std::vector<float> found;
    auto append = [&](const std::vector<float>& from, int64_t row, int64_t rows) {
        found.insert(found.end(), from.begin() + row * kWidth, from.begin() + (row + rows) * kWidth);
    };
    if (op == "all_reduce" || op == "reduce_scatter") {
        std::vector<float> sum(count);
        for (int64_t rank = 0; rank < ranks; ++rank) {
            auto values = operand(ranks, rank);
            for (int64_t i = 0; i < count; ++i) sum[i] += values[i];
        }
        bool scattered = op == "reduce_scatter";
        append(sum, scattered ? place : 0, scattered ? 1 : ranks);
    } else if (op == "all_gather") {
        for (int64_t rank = 0; rank < ranks; ++rank) append(operand(ranks, rank), 0, ranks);
    } else if (op == "all_to_all") {
        for (int64_t rank = 0; rank < ranks; ++rank) append(operand(ranks, rank), place, 1);
    } else if (op == "broadcast") {
        append(operand(ranks, kRoot), 0, ranks);
    } else {
        throw std::invalid_argument("there are no expected values of " + op);
    }
    return found;
}

std::optional<Error> judge(const Segment& test, const std::vector<float>& result, int64_t place,
                           const std::string& tensorrt) {
    const Collective& c = test.collectives.at(0);
    auto right = expected(c.op, c.ranks, place);
    if (right.size() != result.size())
        throw std::invalid_argument("a result of " + std::to_string(result.size()) + " elements for " + test.name);
    for (size_t at = 0; at < result.size(); ++at) {
        if (result[at] == right[at]) continue; // never of a NaN
        std::ostringstream problem;
        problem << tensorrt << " computes " << c.op << " wrong on these GPUs: over the " << c.ranks << " ranks of axis "
                << in_quotes(c.axis) << ", element " << at << " on the rank at " << place << " is " << result[at]
                << " and must be " << right[at] << "; it ignores the communicator that it was given, or takes"
                << " other ranks than those of the axis";
        return launch_error(problem.str(),
                            "build and run the bundle with another version of TensorRT, or export it with"
                            " placement=\"split\" and run it with python -m torchtrt_md.run, where PyTorch"
                            " communicates");
    }
    return std::nullopt;
}

} // namespace mdtrt
