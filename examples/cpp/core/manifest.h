// manifest.json: docs/bundle.md says what it is.  What is parsed here was checked and is consistent with itself.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/json.h"

namespace mdtrt {

inline constexpr int64_t kSchema = 4;

// Named axes over the ranks of a launch, in order; ranks are row-major, the last axis varying fastest.
struct Mesh {
    std::vector<std::pair<std::string, int64_t>> axes;

    int64_t size() const;
    int find(std::string_view axis) const; // its index, -1 where there is none
    int64_t coordinate(int64_t rank, int axis) const { return rank / stride(axis) % axes[axis].second; }
    std::vector<int> group(int64_t rank, int axis) const; // the ordered ranks along the axis that the rank is in
    int64_t stride(int axis) const;
    std::string text() const; // Mesh(cp=2, tp=2)
};

struct Sharding {
    int64_t dim;
    std::string axis;
};

// An input or output of the program, or a weight that is given at load, with its global shape.
struct Value {
    std::string name;
    Shape shape;
    DType dtype;
    std::vector<Sharding> sharding; // empty where every rank has the whole
};

struct Wire {
    std::string kind, name;
    bool operator<(const Wire& other) const { return std::tie(kind, name) < std::tie(other.kind, other.name); }
    bool operator==(const Wire& other) const { return kind == other.kind && name == other.name; }
    std::string text() const { return kind + ":" + name; }
};

// One tensor of a segment: its name there, what it is, and its dtype and shape on this rank.
struct Binding {
    std::string name;
    Wire source;
    DType dtype;
    Shape shape;
    bool transposed; // of a weight of two dims: the segment takes [K, N] where the file has [N, K]

    bool is_weight() const { return source.kind == "weight"; }
    Shape source_shape() const { return transposed ? Shape(shape.rbegin(), shape.rend()) : shape; }
    bool operator==(const Binding& other) const {
        return std::tie(name, source, dtype, shape, transposed) ==
               std::tie(other.name, other.source, other.dtype, other.shape, other.transposed);
    }
};

struct Collective {
    std::string op, axis;
    int64_t ranks;
    DType dtype;
    int64_t elements, bytes_sent;

    bool operator==(const Collective& other) const {
        return std::tie(op, axis, ranks, dtype, elements, bytes_sent) ==
               std::tie(other.op, other.axis, other.ranks, other.dtype, other.elements, other.bytes_sent);
    }
};

struct Segment {
    std::string runs, file;
    std::optional<std::string> axis;
    std::vector<Binding> inputs, outputs;
    std::vector<Collective> collectives;
    std::string name;
};

struct Versions {
    std::string torchtrt_md, torch, flavour, tensorrt;
};

struct Manifest {
    Mesh mesh;
    std::vector<Value> inputs, outputs;
    std::vector<std::vector<Segment>> ranks;
    std::vector<std::optional<std::string>> weights;
    std::string target;
    Versions versions;
    std::map<std::string, std::string> files; // path -> sha256
    std::vector<Segment> self_tests;          // which all ranks run before any other engine, in this order
    std::vector<Value> given;                 // weights that the bundle does not have
    std::map<std::string, std::vector<std::string>> joined; // weights that are several of `given`
    std::string digest;                                     // sha256 of the manifest's own bytes
};

// Raises Error (BundleError): no manifest of this schema, or one that contradicts itself.  `path` is for messages.
Manifest parse_manifest(std::string_view text, const std::string& path);
Manifest read_manifest(const std::string& folder);

// Raises Error (BundleError) for what only Python runs: segments that are no engines, rings inside of engines, and
// weights that are given at load.
void check_runnable(const Manifest& manifest);

// The shape that each rank holds of an input or output; raises Error where a sharding does not fit.
Shape local_shape(const Value& value, const Mesh& mesh);

// A segment in messages.
std::string segment_name(const Segment& segment, size_t index);

} // namespace mdtrt
