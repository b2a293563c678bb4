// Where the tensors of a rank's segments lie in one block of GPU memory: decided once, before the first call.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/manifest.h"

namespace mdtrt {

inline constexpr int64_t kAlignment = 512; // of every tensor: more than TensorRT asks of its bindings

struct Place {
    int64_t offset, bytes;
};

struct Plan {
    // Of inputs, coordinates, values and outputs, by their wires; of weights by their name and how they are taken.
    std::map<Wire, Place> places;
    std::map<std::pair<std::string, bool>, Place> weights; // (name, transposed)
    int64_t bytes = 0;

    const Place& of(const Binding& binding) const;
};

// Values share memory where nothing reads the one any more when the other is written.  Inputs, weights, coordinates
// and outputs keep theirs: they are there before a call, or after it.
Plan plan_memory(const Manifest& manifest, int rank);

// An input or output as an engine itself tells it; `dtype` is PyTorch's name, or TensorRT's of one that PyTorch lacks.
struct Io {
    std::string name;
    bool is_input;
    std::string dtype;
    Shape shape;
};

// Refuse an engine whose inputs and outputs are not those that the manifest will bind: raises Error (BundleError).
void check_io(const std::vector<Io>& found, const Segment& segment, const std::string& name);

} // namespace mdtrt
