#include "core/plan.h"

#include <algorithm>
#include <optional>

#include "core/error.h"
#include "core/text.h"

namespace mdtrt {
namespace {

int64_t rounded(int64_t bytes) { return (std::max<int64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment; }

struct Block {
    int64_t bytes;
    int free_from; // the segment from which on nothing reads it; of a block in use, beyond all
};

} // namespace

const Place& Plan::of(const Binding& binding) const {
    return binding.is_weight() ? weights.at({binding.source.name, binding.transposed}) : places.at(binding.source);
}

Plan plan_memory(const Manifest& manifest, int rank) {
    const auto& segments = manifest.ranks[rank];
    Plan plan;
    auto add = [&](int64_t bytes) {
        Place place{plan.bytes, bytes};
        plan.bytes += rounded(bytes);
        return place;
    };
    for (const auto& axis : manifest.mesh.axes) plan.places[{"coordinate", axis.first}] = add(4);
    for (const auto& [kind, values] : {std::pair{"input", &manifest.inputs}, {"output", &manifest.outputs}})
        for (const auto& value : *values)
            plan.places[{kind, value.name}] = add(bytes_of(local_shape(value, manifest.mesh), value.dtype));

    std::map<Wire, int> last_read; // value -> the last segment that has to do with it
    for (size_t i = 0; i < segments.size(); ++i)
        for (const auto* bindings : {&segments[i].inputs, &segments[i].outputs})
            for (const auto& binding : *bindings) {
                if (binding.source.kind == "value") last_read[binding.source] = static_cast<int>(i);
                std::pair key{binding.source.name, binding.transposed};
                if (binding.is_weight() && !plan.weights.count(key))
                    plan.weights[key] = add(bytes_of(binding.shape, binding.dtype));
            }

    std::vector<Block> blocks;
    std::map<Wire, size_t> block_of;
    for (size_t i = 0; i < segments.size(); ++i)
        for (const auto& binding : segments[i].outputs) {
            if (binding.source.kind != "value") continue;
            int64_t bytes = bytes_of(binding.shape, binding.dtype);
            size_t best = blocks.size();
            for (size_t b = 0; b < blocks.size(); ++b) // the smallest that is large enough and free
                if (blocks[b].free_from <= static_cast<int>(i) && blocks[b].bytes >= bytes &&
                    (best == blocks.size() || blocks[b].bytes < blocks[best].bytes))
                    best = b;
            if (best == blocks.size()) blocks.push_back({bytes, 0});
            blocks[best].free_from = last_read[binding.source] + 1;
            block_of[binding.source] = best;
        }
    std::vector<Place> placed;
    for (const auto& block : blocks) placed.push_back(add(block.bytes));
    for (const auto& [wire, block] : block_of) plan.places[wire] = placed[block];
    return plan;
}

static std::string told(const std::optional<Io>& io, const std::string& name) {
    if (!io) return "no " + in_quotes(name);
    return (io->is_input ? "input " : "output ") + in_quotes(name) + " " + io->dtype + " " + listed(io->shape);
}

void check_io(const std::vector<Io>& found, const Segment& segment, const std::string& name) {
    std::map<std::string, std::pair<std::optional<Io>, std::optional<Io>>> tensors; // of the engine, of the manifest
    for (const Io& io : found) tensors[io.name].first = io;
    for (const auto* bindings : {&segment.inputs, &segment.outputs})
        for (const Binding& b : *bindings)
            tensors[b.name].second = Io{b.name, bindings == &segment.inputs, std::string(b.dtype->name), b.shape};
    for (const auto& [tensor, sides] : tensors) {
        const auto& [there, expected] = sides;
        bool same = there && expected && there->is_input == expected->is_input && there->dtype == expected->dtype &&
                    there->shape == expected->shape;
        if (!same)
            throw bundle_error(name + " has " + told(there, tensor) + " and the manifest has " + told(expected, tensor),
                               "export the bundle again; do not edit manifest.json by hand");
    }
}

} // namespace mdtrt
