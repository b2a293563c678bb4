#include "core/manifest.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>

#include "core/error.h"
#include "core/files.h"
#include "core/limits.h"
#include "core/sha256.h"
#include "core/structure.h"
#include "core/text.h"

namespace mdtrt {
namespace {

// What follows turns JSON into structs, and says with std::runtime_error what is of another form, and where.

template <class F> auto located(const std::string& where, F read) -> decltype(read()) {
    try {
        return read();
    } catch (const std::runtime_error& error) {
        std::string what = error.what();
        if (what.find(", at $") != std::string::npos) throw;
        throw std::runtime_error(what + ", at " + where);
    }
}

int64_t integer(Fields& fields, const char* name) {
    const Json& found = fields.required(name);
    return located(fields.at(name), [&] { return found.integer(); });
}

std::string string(Fields& fields, const char* name) {
    const Json& found = fields.required(name);
    return located(fields.at(name), [&] { return found.string(); });
}

std::string string_or(Fields& fields, const char* name, const char* absent) {
    const Json* found = fields.optional(name);
    return found ? located(fields.at(name), [&] { return found->string(); }) : absent;
}

template <class T>
std::vector<T> list(const Json& json, const std::string& where, T (*one)(const Json&, const std::string&)) {
    const auto& array = located(where, [&]() -> const Json::Array& { return json.array(); });
    std::vector<T> found;
    found.reserve(array.size());
    for (size_t i = 0; i < array.size(); ++i) found.push_back(one(array[i], where + "[" + std::to_string(i) + "]"));
    return found;
}

template <class T> std::vector<T> list(Fields& fields, const char* name, T (*one)(const Json&, const std::string&)) {
    return list(fields.required(name), fields.at(name), one);
}

std::string text_of(const Json& json, const std::string& where) {
    return located(where, [&] { return json.string(); });
}
int64_t integer_of(const Json& json, const std::string& where) {
    return located(where, [&] { return json.integer(); });
}

DType dtype(Fields& fields) {
    std::string name = string(fields, "dtype");
    if (DType found = dtype_of(name)) return found;
    throw std::runtime_error("the dtype " + in_quotes(name) + " is not known, at " + fields.at("dtype"));
}

const Json::Array& pair(const Json& json, const std::string& where) {
    const auto& array = located(where, [&]() -> const Json::Array& { return json.array(); });
    if (array.size() != 2)
        throw std::runtime_error("it is a list of " + std::to_string(array.size()) + ", not of 2, at " + where);
    return array;
}

Sharding sharding(const Json& json, const std::string& where) {
    const auto& array = pair(json, where);
    return {integer_of(array[0], where), text_of(array[1], where)};
}

Value value(const Json& json, const std::string& where) {
    Fields fields(json, where);
    Value found{string(fields, "name"), list(fields, "shape", integer_of), dtype(fields), {}};
    if (const Json* shardings = fields.optional("sharding"))
        found.sharding = list(*shardings, fields.at("sharding"), sharding);
    fields.none_left();
    return found;
}

Binding binding(const Json& json, const std::string& where) {
    static const char* const kKinds[] = {"input", "coordinate", "weight", "value", "output"};
    Fields fields(json, where);
    const auto& source = pair(fields.required("source"), fields.at("source"));
    Binding found{string(fields, "name"),
                  {text_of(source[0], fields.at("source")), text_of(source[1], fields.at("source"))},
                  dtype(fields),
                  list(fields, "shape", integer_of),
                  false};
    if (std::find(std::begin(kKinds), std::end(kKinds), found.source.kind) == std::end(kKinds))
        throw std::runtime_error("the source " + in_quotes(found.source.kind) + " is not known, at " + where);
    if (const Json* turned = fields.optional("transposed"))
        found.transposed = located(fields.at("transposed"), [&] { return turned->boolean(); });
    fields.none_left();
    return found;
}

Collective collective(const Json& json, const std::string& where) {
    Fields fields(json, where);
    Collective found{string(fields, "op"), string(fields, "axis"),      integer(fields, "ranks"),
                     dtype(fields),        integer(fields, "elements"), integer(fields, "bytes_sent")};
    fields.none_left();
    return found;
}

Segment segment(const Json& json, const std::string& where) {
    Fields fields(json, where);
    Segment found;
    found.runs = string(fields, "runs");
    if (found.runs != "engine" && found.runs != "inductor" && found.runs != "eager")
        throw std::runtime_error("a segment that runs as " + in_quotes(found.runs) + " is not known, at " + where);
    found.file = string(fields, "file");
    const Json& axis = fields.required("axis");
    if (!axis.is_null()) found.axis = text_of(axis, fields.at("axis"));
    found.inputs = list(fields, "inputs", binding);
    found.outputs = list(fields, "outputs", binding);
    found.collectives = list(fields, "collectives", collective);
    found.name = string_or(fields, "name", "");
    fields.none_left();
    return found;
}

std::vector<Segment> segments(const Json& json, const std::string& where) { return list(json, where, segment); }

std::optional<std::string> path_or_null(const Json& json, const std::string& where) {
    if (json.is_null()) return std::nullopt;
    return text_of(json, where);
}

Versions versions(Fields& of) {
    Fields fields(of.required("versions"), of.at("versions"));
    Versions found{string(fields, "torchtrt_md"), string(fields, "torch"), string(fields, "flavour"),
                   string(fields, "tensorrt")};
    fields.none_left();
    return found;
}

// Why something was chosen: for people, but a reader says what it does not understand.
int decision(const Json& json, const std::string& where) {
    Fields fields(json, where);
    string(fields, "what");
    string(fields, "chosen");
    string(fields, "why");
    if (const Json* times = fields.optional("times_ms"))
        located(fields.at("times_ms"), [&] {
            for (const auto& entry : times->object()) entry.second.number();
            return 0;
        });
    fields.none_left();
    return 0;
}

std::vector<std::string> constants(Fields& of) {
    const Json& found = of.required("constants");
    return located(of.at("constants"), [&] {
        std::vector<std::string> names;
        for (const auto& entry : found.object()) {
            if (!entry.second.is_null() && !entry.second.is_boolean() && !entry.second.is_number() &&
                !entry.second.is_string())
                throw std::runtime_error("the constant " + in_quotes(entry.first) + " is " + entry.second.kind());
            names.push_back(entry.first);
        }
        return names;
    });
}

// How the outputs nest in what the model returns.
void check_result(const Json& result, int64_t outputs, int depth) {
    if (depth > kMaxDepth)
        throw bundle_error("the manifest's result is nested deeper than " + std::to_string(kMaxDepth),
                           "export the bundle again; do not edit manifest.json by hand");
    auto refuse = [&] {
        return bundle_error("the manifest's result has a part that is not understood",
                            "export the bundle again; do not edit manifest.json by hand");
    };
    try {
        if (result.object().size() != 1) throw refuse();
        const auto& [kind, part] = result.object().front();
        if (kind == "tuple" || kind == "list") {
            for (const auto& inner : part.array()) check_result(inner, outputs, depth + 1);
        } else if (kind == "dict") {
            for (const auto& inner : part.object()) check_result(inner.second, outputs, depth + 1);
        } else if (kind == "output") {
            if (part.integer() < 0 || part.integer() >= outputs) throw refuse();
        } else if (kind != "constant" ||
                   !(part.is_null() || part.is_boolean() || part.is_number() || part.is_string())) {
            throw refuse();
        }
    } catch (const Error&) { throw; } catch (const std::runtime_error&) {
        throw refuse();
    }
}

int64_t schema_of(const Json& json) {
    const Json* schema = json.find("schema");
    if (!schema) throw std::runtime_error("the field 'schema' is missing");
    return located("$.schema", [&] { return schema->integer(); });
}

struct Parsed {
    Manifest manifest;
    Described described;
};

Parsed parsed(const Json& json) {
    Fields fields(json, "$");
    Parsed found;
    Manifest& m = found.manifest;
    integer(fields, "schema");
    const Json& mesh = fields.required("mesh");
    located("$.mesh", [&] {
        for (const auto& axis : mesh.object()) m.mesh.axes.emplace_back(axis.first, axis.second.integer());
        return 0;
    });
    m.inputs = list(fields, "inputs", value);
    m.outputs = list(fields, "outputs", value);
    found.described.constants = constants(fields);
    found.described.positional = list(fields, "positional", text_of);
    const Json& result = fields.required("result");
    if (located("$.result", [&] { return result.object().size(); }) != 1) check_result(result, 0, 0);
    found.described.placement = string(fields, "placement");
    m.ranks = list(fields, "ranks", segments);
    m.weights = list(fields, "weights", path_or_null);
    m.target = string(fields, "target");
    m.versions = versions(fields);
    const Json& files = fields.required("files");
    located("$.files", [&] {
        for (const auto& file : files.object()) m.files.emplace(file.first, file.second.string());
        return 0;
    });
    if (const Json* tests = fields.optional("self_tests")) m.self_tests = list(*tests, "$.self_tests", segment);
    if (const Json* given = fields.optional("given")) m.given = list(*given, "$.given", value);
    if (const Json* joined = fields.optional("joined"))
        for (const auto& weight : located("$.joined", [&]() -> const Json::Object& { return joined->object(); }))
            m.joined[weight.first] = list(weight.second, "$.joined", text_of);
    found.described.transport = string_or(fields, "transport", "nccl");
    if (const Json* decisions = fields.optional("decisions")) list(*decisions, "$.decisions", decision);
    string_or(fields, "tuned_on", "");
    if (const Json* opaque = fields.optional("opaque")) found.described.opaque = list(*opaque, "$.opaque", text_of);
    fields.none_left();
    return found;
}

} // namespace

int64_t Mesh::size() const {
    int64_t size = 1;
    for (const auto& axis : axes) {
        if (axis.second > kMaxRanks) return kMaxRanks + 1; // whatever it is, it is too many
        size *= axis.second;
        if (size > kMaxRanks) return kMaxRanks + 1;
    }
    return size;
}

int Mesh::find(std::string_view axis) const {
    for (size_t i = 0; i < axes.size(); ++i)
        if (axes[i].first == axis) return static_cast<int>(i);
    return -1;
}

int64_t Mesh::stride(int axis) const {
    int64_t stride = 1;
    for (size_t i = axis + 1; i < axes.size(); ++i) stride *= axes[i].second;
    return stride;
}

std::vector<int> Mesh::group(int64_t rank, int axis) const {
    int64_t first = rank - coordinate(rank, axis) * stride(axis);
    std::vector<int> ranks;
    for (int64_t i = 0; i < axes[axis].second; ++i) ranks.push_back(static_cast<int>(first + i * stride(axis)));
    return ranks;
}

std::string Mesh::text() const {
    std::vector<std::string> parts;
    for (const auto& axis : axes) parts.push_back(axis.first + "=" + std::to_string(axis.second));
    return "Mesh(" + joined(parts) + ")";
}

Manifest parse_manifest(std::string_view text, const std::string& path) {
    Json json;
    int64_t schema = 0;
    try {
        json = Json::parse(text);
        schema = schema_of(json);
    } catch (const std::runtime_error& error) {
        throw bundle_error(path + " is not a bundle's manifest: " + error.what(), "export the bundle again");
    }
    if (schema != kSchema)
        throw bundle_error(
            path + " has schema " + std::to_string(schema) + " and this runner reads schema " + std::to_string(kSchema),
            "build the runner of the version of torchtrt_md that wrote the bundle (versions.torchtrt_md in"
            " that file), or export it again");
    Parsed found;
    try {
        found = parsed(json);
    } catch (const Error&) { throw; } catch (const std::runtime_error& error) {
        throw bundle_error(path + " does not follow schema " + std::to_string(kSchema) + ": " + error.what(),
                           "export the bundle again");
    }
    check_structure(found.manifest, found.described);
    check_result(*json.find("result"), static_cast<int64_t>(found.manifest.outputs.size()), 0);
    found.manifest.digest = sha256(text);
    return std::move(found.manifest);
}

Manifest read_manifest(const std::string& folder) {
    std::string text;
    try {
        text = read_file(folder, "manifest.json", kMaxManifestBytes);
    } catch (const Error& error) {
        throw bundle_error("there is no bundle at " + folder + ": " + error.problem,
                           "give the folder that the export wrote, whole");
    }
    return parse_manifest(text, folder + "/manifest.json");
}

void check_runnable(const Manifest& manifest) {
    if (!manifest.given.empty())
        throw bundle_error("the bundle lacks " + std::to_string(manifest.given.size()) + " weights of its model, " +
                               in_quotes(manifest.given[0].name) +
                               " first, and this runner cannot take them from a checkpoint",
                           "export the bundle again with its weights (without --strip-weights), or run it from Python,"
                           " which gives them at load");
    for (size_t rank = 0; rank < manifest.ranks.size(); ++rank)
        for (size_t i = 0; i < manifest.ranks[rank].size(); ++i) {
            const Segment& segment = manifest.ranks[rank][i];
            if (segment.runs != "engine")
                throw bundle_error(
                    segment_name(segment, i) + " of rank " + std::to_string(rank) + " runs as " + segment.runs +
                        ", and this runner has no PyTorch to run it",
                    "export again with placement=\"engine\" (--placement engine) and compute=\"tensorrt\", or run the"
                    " bundle with python -m torchtrt_md.run");
            for (const Collective& c : segment.collectives)
                if (c.op == "ring_attention")
                    throw bundle_error(segment_name(segment, i) +
                                           " has ring attention inside the engine, which this"
                                           " runner cannot test on the GPUs at hand; some compute it wrong",
                                       "export again with another strategy (--strategy ulysses), or run the bundle with"
                                       " python -m torchtrt_md.run");
        }
}

Shape local_shape(const Value& value, const Mesh& mesh) {
    Shape shape = value.shape;
    for (const auto& sharding : value.sharding) {
        int axis = mesh.find(sharding.axis);
        bool fits = axis >= 0 && sharding.dim >= 0 && sharding.dim < static_cast<int64_t>(shape.size()) &&
                    shape[sharding.dim] % mesh.axes[axis].second == 0;
        if (!fits)
            throw bundle_error(in_quotes(value.name) + " of shape " + listed(value.shape) +
                                   " cannot be sharded on dim " + std::to_string(sharding.dim) + " along axis " +
                                   in_quotes(sharding.axis) + " of " + mesh.text(),
                               "export the bundle again; do not edit manifest.json by hand");
        shape[sharding.dim] /= mesh.axes[axis].second;
    }
    return shape;
}

std::string segment_name(const Segment& segment, size_t index) {
    return "segment " + std::to_string(index) + " (" + (segment.name.empty() ? segment.file : segment.name) + ")";
}

} // namespace mdtrt
