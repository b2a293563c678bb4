#include "core/structure.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <unordered_set>

#include "core/error.h"
#include "core/files.h"
#include "core/limits.h"
#include "core/selftest.h"
#include "core/text.h"

namespace mdtrt {
namespace {

Error refused(const std::string& problem) {
    return bundle_error(problem, "export the bundle again; do not edit manifest.json by hand");
}

using Known = std::pair<DType, Shape>; // the dtype and shape of a wire
using Wires = std::map<Wire, Known>;

void check_shape(const Shape& shape, DType dtype, const std::string& what) {
    if (shape.size() > kMaxDims)
        throw refused(what + " has " + std::to_string(shape.size()) + " dims, and a tensor has at most " +
                      std::to_string(kMaxDims));
    // An extent of 0 hides no other, as in Python.
    unsigned __int128 bytes = static_cast<unsigned>(dtype->itemsize);
    for (int64_t extent : shape) {
        if (extent < 0) throw refused(what + " has shape " + listed(shape));
        bytes *= static_cast<uint64_t>(std::max<int64_t>(extent, 1));
        if (bytes > static_cast<uint64_t>(kMaxTensorBytes))
            throw refused(what + " has shape " + listed(shape) + ", and a tensor of a bundle has at most " +
                          std::to_string(kMaxTensorBytes) + " bytes");
    }
}

bool is_axis_name(const std::string& name) {
    auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
    return !name.empty() && name != "self" && letter(name[0]) &&
           std::all_of(name.begin(), name.end(), [&](char c) { return letter(c) || (c >= '0' && c <= '9'); });
}

void check_mesh(const Manifest& manifest) {
    const Mesh& mesh = manifest.mesh;
    if (mesh.axes.empty()) throw refused("the manifest's mesh has no axis");
    if (mesh.axes.size() > kMaxAxes)
        throw refused("the manifest's mesh has " + std::to_string(mesh.axes.size()) + " axes, more than " +
                      std::to_string(kMaxAxes));
    for (const auto& axis : mesh.axes) {
        if (!is_axis_name(axis.first))
            throw refused("the manifest's mesh has an axis " + in_quotes(axis.first) + ", which is no name of an axis");
        if (axis.second < 1)
            throw refused("the manifest's mesh is not one: axis " + in_quotes(axis.first) + " has size " +
                          std::to_string(axis.second));
    }
    if (mesh.size() > kMaxRanks)
        throw refused("the manifest's mesh " + mesh.text() + " has more than " + std::to_string(kMaxRanks) + " ranks");
    for (const auto& [what, count] :
         {std::pair{"segments", manifest.ranks.size()}, {"weights", manifest.weights.size()}})
        if (static_cast<int64_t>(count) != mesh.size())
            throw refused("the manifest has " + std::string(what) + " for " + std::to_string(count) + " ranks and " +
                          mesh.text() + " has " + std::to_string(mesh.size()));
}

void check_choice(const std::string& what, const std::string& found, const std::vector<std::string>& choices) {
    if (std::find(choices.begin(), choices.end(), found) == choices.end())
        throw refused("the manifest's " + what + " is " + in_quotes(found) + ", which is none of " + joined(choices));
}

void check_files(const Manifest& manifest) {
    for (const auto& [path, digest] : manifest.files) {
        check_path(path);
        bool plain = digest.size() == 64 && digest.find_first_not_of("0123456789abcdef") == std::string::npos;
        if (path == "manifest.json" || !plain)
            throw refused("the manifest gives the file " + in_quotes(path) + " the sha256 " + in_quotes(digest));
    }
}

const std::string* twice(const std::vector<const std::string*>& names) {
    std::unordered_set<std::string> seen;
    for (const auto* name : names)
        if (!seen.insert(*name).second) return name;
    return nullptr;
}

void check_names(const std::string& kind, const std::vector<const std::string*>& names) {
    if (const auto* name = twice(names))
        throw refused("the manifest has more than one " + kind + " " + in_quotes(*name));
    for (const auto* name : names)
        if (name->empty()) throw refused("the manifest has an " + kind + " without a name");
}

void check_all_names(const Manifest& manifest, const Described& described) {
    std::vector<const std::string*> inputs, outputs, positional;
    for (const auto& value : manifest.inputs) inputs.push_back(&value.name);
    for (const auto& name : described.constants) inputs.push_back(&name);
    for (const auto& name : described.opaque) inputs.push_back(&name);
    for (const auto& value : manifest.outputs) outputs.push_back(&value.name);
    for (const auto& name : described.positional) positional.push_back(&name);
    check_names("input", inputs);
    check_names("output", outputs);
    check_names("positional argument", positional);
}

void check_collective(const Collective& c, const std::string& where) {
    static const std::set<std::string> kOps = {"all_reduce", "all_gather",     "reduce_scatter", "all_to_all",
                                               "broadcast",  "permute_tensor", "ring_attention"};
    if (!kOps.count(c.op)) throw refused(where + " has the collective " + in_quotes(c.op) + ", which is not known");
    check_shape({c.elements}, c.dtype, "the operand of a " + c.op + " of " + where);
    if (c.bytes_sent < 0 || c.bytes_sent / c.ranks > kMaxTensorBytes ||
        (c.bytes_sent / c.ranks == kMaxTensorBytes && c.bytes_sent % c.ranks))
        throw refused("a " + c.op + " of " + where + " sends " + std::to_string(c.bytes_sent) + " bytes");
}

void check_communication(const Mesh& mesh, const Segment& segment, const std::string& where) {
    if (segment.axis && segment.runs != "engine")
        throw refused(where + " runs as " + segment.runs + " and has a communicator of axis " +
                      in_quotes(*segment.axis) + ", which only an engine has");
    if (segment.axis && mesh.find(*segment.axis) < 0)
        throw refused(where + " communicates on axis " + in_quotes(*segment.axis) + ", which " + mesh.text() +
                      " lacks");
    for (const Collective& c : segment.collectives) {
        if (segment.runs == "inductor")
            throw refused(where + " runs as inductor and has a " + in_quotes(c.op) + " on axis " + in_quotes(c.axis));
        if (segment.runs == "engine" && (!segment.axis || c.axis != *segment.axis))
            throw refused(where + " has a " + in_quotes(c.op) + " on axis " + in_quotes(c.axis) +
                          ", and its communicator is that of axis " +
                          (segment.axis ? in_quotes(*segment.axis) : "null"));
        int axis = mesh.find(c.axis);
        if (axis < 0 || c.ranks != mesh.axes[axis].second)
            throw refused(where + " has a " + in_quotes(c.op) + " over " + std::to_string(c.ranks) + " ranks of axis " +
                          in_quotes(c.axis) + " of " + mesh.text());
        check_collective(c, where);
    }
}

void check_segment(const Manifest& manifest, const Segment& segment, const std::string& where) {
    if (!manifest.files.count(segment.file))
        throw refused(where + " runs " + in_quotes(segment.file) + ", which is not among the manifest's files");
    check_communication(manifest.mesh, segment, where);
    // An engine finds all its tensors by name, a graph its inputs only; what it returns has an order.
    std::vector<const std::string*> names;
    for (const auto& binding : segment.inputs) names.push_back(&binding.name);
    if (segment.runs == "engine")
        for (const auto& binding : segment.outputs) names.push_back(&binding.name);
    if (const auto* name = twice(names)) throw refused(where + " binds a tensor twice: " + in_quotes(*name));
    for (const auto* bindings : {&segment.inputs, &segment.outputs})
        for (const Binding& binding : *bindings) {
            check_shape(binding.shape, binding.dtype, where + ": " + in_quotes(binding.source.text()));
            if (binding.transposed && (!binding.is_weight() || binding.shape.size() != 2))
                throw refused(where + " takes " + in_quotes(binding.source.text()) + " of shape " +
                              listed(binding.shape) + " transposed, and only weights of two dims can be");
        }
}

void check_binding(const Binding& binding, const Known& known, const std::string& where) {
    if (binding.dtype == known.first && binding.source_shape() == known.second) return;
    throw refused(where + " binds " + in_quotes(binding.source.text()) + " as " + std::string(binding.dtype->name) +
                  " " + listed(binding.source_shape()) + ", and it is " + std::string(known.first->name) + " " +
                  listed(known.second));
}

// What a rank holds of each weight that is given at load.
Wires given_weights(const Manifest& manifest) {
    std::vector<const std::string*> names;
    for (const auto& value : manifest.given) names.push_back(&value.name);
    for (const auto& weight : manifest.joined) names.push_back(&weight.first);
    if (const auto* name = twice(names)) throw refused("the manifest has more than one weight " + in_quotes(*name));
    Wires held;
    for (const auto& value : manifest.given) {
        check_shape(value.shape, value.dtype, "the weight " + in_quotes(value.name));
        held[{"weight", value.name}] = {value.dtype, local_shape(value, manifest.mesh)};
    }
    Wires found = held;
    for (const auto& [name, parts] : manifest.joined) {
        auto unfit = [&, &name = name] {
            return refused("the manifest joins the weight " + in_quotes(name) + " of others that do not fit");
        };
        std::optional<Known> whole;
        for (const auto& part : parts) {
            auto known = held.find({"weight", part});
            if (known == held.end() || known->second.second.empty()) throw unfit();
            const auto& [dtype, shape] = known->second;
            if (!whole) {
                whole = known->second;
                continue;
            }
            Shape like = shape;
            like[0] = whole->second[0];
            if (dtype != whole->first || like != whole->second) throw unfit();
            // Beyond the limit nothing that a segment may take is equal to it.
            whole->second[0] = std::min(whole->second[0] + shape[0], 2 * kMaxTensorBytes);
        }
        if (!whole) throw unfit();
        found[{"weight", name}] = *whole;
    }
    return found;
}

void check_rank(const Manifest& manifest, const Wires& given, const Wires& outputs, const Wires& given_weights,
                size_t rank) {
    const auto& weights = manifest.weights[rank];
    if (weights && !manifest.files.count(*weights))
        throw refused("the weights of rank " + std::to_string(rank) + " are in " + in_quotes(*weights) +
                      ", which is not among the manifest's files");
    Wires made; // by a segment before; of weights: taken by one
    for (size_t i = 0; i < manifest.ranks[rank].size(); ++i) {
        const Segment& segment = manifest.ranks[rank][i];
        std::string where = "segment " + std::to_string(i) + " of rank " + std::to_string(rank);
        check_segment(manifest, segment, where);
        for (const Binding& binding : segment.inputs) {
            auto at_load = given_weights.find(binding.source);
            if (at_load != given_weights.end()) {
                made[binding.source] = at_load->second;
            } else if (binding.is_weight()) {
                if (!weights)
                    throw refused(where + " reads " + in_quotes(binding.source.text()) + ", and rank " +
                                  std::to_string(rank) + " has no file of weights");
                made.emplace(binding.source, Known(binding.dtype, binding.source_shape()));
            }
            auto known = std::as_const(made).find(binding.source);
            if (known == made.cend()) {
                known = given.find(binding.source);
                if (known == given.end())
                    throw refused(where + " reads " + in_quotes(binding.source.text()) +
                                  ", which nothing before it makes");
            }
            check_binding(binding, known->second, where);
        }
        for (const Binding& binding : segment.outputs) {
            auto output = outputs.find(binding.source);
            if (output == outputs.end() && binding.source.kind != "value")
                throw refused(where + " writes " + in_quotes(binding.source.text()) +
                              ", which is no output of the program and no value");
            if (made.count(binding.source))
                throw refused(where + " writes " + in_quotes(binding.source.text()) + " a second time");
            const Known& known =
                made.emplace(binding.source,
                             output == outputs.end() ? Known(binding.dtype, binding.shape) : output->second)
                    .first->second;
            check_binding(binding, known, where);
        }
    }
    for (const auto& output : outputs)
        if (!made.count(output.first))
            throw refused("no segment of rank " + std::to_string(rank) + " writes " + in_quotes(output.first.text()));
}

// Do the ranks meet at their collectives?  If not, a call would hang.  Each rank is walked through its own, in order:
// one is entered by all ranks of its group, or nobody leaves it.
class Walk {
  public:
    explicit Walk(const Manifest& manifest) : mesh_(manifest.mesh) {
        for (const auto& segments : manifest.ranks) {
            todo_.emplace_back();
            for (const auto& segment : segments)
                for (const auto& c : segment.collectives) todo_.back().emplace_back(&c, mesh_.find(c.axis));
        }
        at_.assign(todo_.size(), 0);
    }

    void check() {
        std::map<std::pair<int, int64_t>, std::vector<int>> waiting; // by axis and the first rank of the group
        std::vector<int> moving;
        for (size_t rank = 0; rank < todo_.size(); ++rank) moving.push_back(static_cast<int>(rank));
        while (!moving.empty()) {
            int rank = moving.back();
            moving.pop_back();
            if (at_[rank] == todo_[rank].size()) continue;
            const auto& [mine, axis] = todo_[rank][at_[rank]];
            auto group = std::pair{axis, rank - mesh_.coordinate(rank, axis) * mesh_.stride(axis)};
            auto& there = waiting[group];
            if (!there.empty() && !(*todo_[there[0]][at_[there[0]]].first == *mine)) refuse(rank, there[0]);
            there.push_back(rank);
            if (static_cast<int64_t>(there.size()) < mesh_.axes[axis].second) continue;
            for (int member : there) {
                ++at_[member];
                moving.push_back(member);
            }
            waiting.erase(group);
        }
        for (const auto& [group, there] : waiting)
            for (int rank : mesh_.group(there[0], group.first))
                if (std::find(there.begin(), there.end(), rank) == there.end()) refuse(there[0], rank);
    }

  private:
    [[noreturn]] void refuse(int rank, int other) const {
        throw refused("the ranks of " + mesh_.text() + " would wait for each other: " + stands(std::min(rank, other)) +
                      ", and " + stands(std::max(rank, other)));
    }
    std::string stands(int rank) const {
        std::string who = "rank " + std::to_string(rank);
        if (at_[rank] == todo_[rank].size())
            return who + " has finished after " + std::to_string(at_[rank]) + " collectives";
        const Collective& c = *todo_[rank][at_[rank]].first;
        return who + " stands at its collective " + std::to_string(at_[rank]) + ", " + c.op + " on axis " +
               in_quotes(c.axis) + " of " + std::to_string(c.elements) + " " + std::string(c.dtype->name);
    }

    const Mesh& mesh_;
    std::vector<std::vector<std::pair<const Collective*, int>>> todo_; // of each rank, with the index of the axis
    std::vector<size_t> at_;
};

} // namespace

void check_structure(const Manifest& manifest, const Described& described) {
    check_mesh(manifest);
    check_choice("placement", described.placement, {"engine", "split"});
    check_choice("transport", described.transport, {"nccl", "store"});
    check_files(manifest);
    check_all_names(manifest, described);
    Wires given, outputs;
    for (const auto& axis : manifest.mesh.axes) given[{"coordinate", axis.first}] = {dtype_of("int32"), {1}};
    for (const auto& [kind, values, wires] :
         {std::tuple{"input", &manifest.inputs, &given}, {"output", &manifest.outputs, &outputs}})
        for (const Value& value : *values) {
            check_shape(value.shape, value.dtype, "the " + std::string(kind) + " " + in_quotes(value.name));
            (*wires)[{kind, value.name}] = {value.dtype, local_shape(value, manifest.mesh)};
        }
    Wires weights = given_weights(manifest);
    for (size_t rank = 0; rank < manifest.ranks.size(); ++rank) check_rank(manifest, given, outputs, weights, rank);
    check_self_tests(manifest);
    Walk(manifest).check();
}

} // namespace mdtrt
