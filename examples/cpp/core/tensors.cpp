#include "core/tensors.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <unistd.h>

#include "core/error.h"
#include "core/json.h"
#include "core/limits.h"
#include "core/text.h"

namespace mdtrt {
namespace {

const char* const kCopy = "copy the file again, whole, or write it again";

// Bytes of a tensor, or -1 where it cannot be.
int64_t checked_bytes(const Shape& shape, DType dtype) {
    unsigned __int128 bytes = static_cast<unsigned>(dtype->itemsize);
    for (int64_t extent : shape) {
        if (extent < 0) return -1;
        bytes *= static_cast<uint64_t>(extent);
        if (bytes > static_cast<uint64_t>(kMaxTensorBytes)) return -1;
    }
    return static_cast<int64_t>(bytes);
}

struct Stored {
    DType dtype;
    Shape shape;
    int64_t begin, end;
};

Stored stored(const Json& json, const std::string& where) {
    Fields fields(json, where);
    const std::string& name = fields.required("dtype").string();
    Stored found{dtype_of_safetensors(name), {}, 0, 0};
    if (!found.dtype) throw std::runtime_error("the dtype " + in_quotes(name) + " is not known, at " + where);
    for (const Json& extent : fields.required("shape").array()) found.shape.push_back(extent.integer());
    const auto& offsets = fields.required("data_offsets").array();
    if (offsets.size() != 2 || found.shape.size() > kMaxDims) throw std::runtime_error("it is no tensor, at " + where);
    found.begin = offsets[0].integer();
    found.end = offsets[1].integer();
    fields.none_left();
    return found;
}

std::map<std::string, View> read_header(std::string_view file) {
    if (file.size() < 8) throw std::runtime_error("it has " + std::to_string(file.size()) + " bytes");
    uint64_t length = 0;
    for (int i = 0; i < 8; ++i) length |= static_cast<uint64_t>(static_cast<unsigned char>(file[i])) << (8 * i);
    if (length > static_cast<uint64_t>(kMaxHeaderBytes) || length > file.size() - 8)
        throw std::runtime_error("its header has " + std::to_string(length) + " bytes, and the file " +
                                 std::to_string(file.size()));
    Json header = Json::parse(file.substr(8, length));
    std::string_view data = file.substr(8 + length);
    std::map<std::string, View> tensors;
    std::vector<std::pair<int64_t, int64_t>> extents;
    for (const auto& [name, entry] : header.object()) {
        if (name == "__metadata__") {
            for (const auto& text : entry.object()) text.second.string();
            continue;
        }
        Stored found = stored(entry, in_quotes(name));
        int64_t bytes = checked_bytes(found.shape, found.dtype);
        if (found.begin < 0 || found.end < found.begin || found.end > static_cast<int64_t>(data.size()) ||
            bytes != found.end - found.begin)
            throw std::runtime_error(in_quotes(name) + " of shape " + listed(found.shape) + " cannot lie at " +
                                     std::to_string(found.begin) + " to " + std::to_string(found.end) + " of " +
                                     std::to_string(data.size()) + " bytes");
        extents.emplace_back(found.begin, found.end);
        tensors[name] = {found.dtype, found.shape, data.substr(found.begin, bytes)};
    }
    // As the format has it: no two tensors share bytes, and there are none between them.
    std::sort(extents.begin(), extents.end());
    int64_t at = 0;
    for (const auto& [begin, end] : extents) {
        if (begin != at) throw std::runtime_error("its tensors do not lie one behind the other");
        at = end;
    }
    if (at != static_cast<int64_t>(data.size())) throw std::runtime_error("it has bytes that belong to no tensor");
    return tensors;
}

void write_whole(const std::string& path, const std::vector<std::string_view>& pieces) {
    std::string aside = path + "." + std::to_string(getpid()) + ".unfinished";
    FILE* file = std::fopen(aside.c_str(), "wb");
    bool fine = file != nullptr;
    for (auto piece : pieces) fine = fine && std::fwrite(piece.data(), 1, piece.size(), file) == piece.size();
    int code = errno;
    if (file && std::fclose(file)) {
        code = errno;
        fine = false;
    }
    if (fine && std::rename(aside.c_str(), path.c_str()) == 0) return;
    if (fine) code = errno;
    if (file) std::remove(aside.c_str());
    throw launch_error(path + " cannot be written: " + std::strerror(code), "give a path in a folder with room");
}

// Calls `row(whole offset, part offset, bytes)` for each run of bytes that lies together in both the whole and the
// part.
template <class F> void each_row(const Value& value, const Mesh& mesh, int64_t rank, F row) {
    Shape first(value.shape.size(), 0), extent = value.shape;
    for (const auto& s : value.sharding) { // applied in order, each to what the ones before it left
        int axis = mesh.find(s.axis);
        extent[s.dim] /= mesh.axes[axis].second;
        first[s.dim] += mesh.coordinate(rank, axis) * extent[s.dim];
    }
    if (elements_of(extent) == 0) return;
    size_t inner = value.shape.size(); // dims from here on are whole
    while (inner > 0 && extent[inner - 1] == value.shape[inner - 1]) --inner;
    int64_t bytes = value.dtype->itemsize;
    for (size_t dim = inner ? inner - 1 : 0; dim < extent.size(); ++dim) bytes *= extent[dim];
    Shape at(inner ? inner - 1 : 0, 0); // of the row, in the outer dims of the part
    for (int64_t done = 0, total = bytes_of(extent, value.dtype); done < total; done += bytes) {
        int64_t offset = 0;
        for (size_t dim = 0; dim < value.shape.size(); ++dim)
            offset = offset * value.shape[dim] + first[dim] + (dim < at.size() ? at[dim] : 0);
        row(offset * value.dtype->itemsize, done, bytes);
        for (size_t dim = at.size(); dim-- > 0;) {
            if (++at[dim] < extent[dim]) break;
            at[dim] = 0;
        }
    }
}

} // namespace

SafeTensors::SafeTensors(Mapped file, const std::string& path) : file_(std::move(file)) {
    try {
        tensors_ = read_header(file_.bytes());
    } catch (const std::runtime_error& error) {
        throw bundle_error(path + " is not a whole safetensors file: " + error.what(), kCopy);
    }
}

void write_safetensors(const std::string& path, const std::map<std::string, View>& tensors) {
    // The largest elements first, as the format's own writer has it: every tensor is then aligned for its dtype.
    std::vector<std::pair<std::string, const View*>> order;
    for (const auto& [name, tensor] : tensors) order.emplace_back(name, &tensor);
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
        return a.second->dtype->itemsize > b.second->dtype->itemsize;
    });
    Json::Object header;
    int64_t end = 0;
    std::vector<std::string_view> pieces(2);
    for (const auto& [name, tensor] : order) {
        if (tensor->dtype->safetensors.empty())
            throw launch_error(in_quotes(name) + " is " + std::string(tensor->dtype->name) +
                               ", which a safetensors file cannot hold");
        int64_t begin = end;
        end += static_cast<int64_t>(tensor->bytes.size());
        Json::Array shape(tensor->shape.begin(), tensor->shape.end());
        header.emplace_back(name, Json::Object{{"dtype", std::string(tensor->dtype->safetensors)},
                                               {"shape", std::move(shape)},
                                               {"data_offsets", Json::Array{begin, end}}});
        pieces.push_back(tensor->bytes);
    }
    std::string text = Json(std::move(header)).text();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    std::string length;
    for (int shift = 0; shift < 64; shift += 8) length += static_cast<char>(text.size() >> shift & 255);
    pieces[0] = length;
    pieces[1] = text;
    write_whole(path, pieces);
}

void write_text(const std::string& path, std::string_view text) { write_whole(path, {text}); }

void check_inputs(const std::map<std::string, View>& inputs, const Manifest& manifest) {
    std::vector<std::string> takes;
    for (const auto& value : manifest.inputs)
        takes.push_back(value.name + " " + std::string(value.dtype->name) + listed(value.shape));
    for (const auto& [name, input] : inputs) {
        auto same = [&name = name](const Value& value) { return value.name == name; };
        if (std::none_of(manifest.inputs.begin(), manifest.inputs.end(), same))
            throw input_error("the engines have no input " + in_quotes(name) + "; they take " + joined(takes),
                              "leave it out, or export the bundle again with it among the example arguments");
    }
    for (const auto& value : manifest.inputs) {
        auto found = inputs.find(value.name);
        if (found == inputs.end())
            throw input_error("the input " + in_quotes(value.name) + " is missing; the engines take " + joined(takes),
                              "give all of them, by these names");
        if (found->second.dtype != value.dtype)
            throw input_error("input " + in_quotes(value.name) + " is " + std::string(found->second.dtype->name) +
                                  " and the engines take " + std::string(value.dtype->name),
                              "cast it to " + std::string(value.dtype->name));
        if (found->second.shape != value.shape)
            throw input_error("input " + in_quotes(value.name) + " has shape " + listed(found->second.shape) +
                                  " and the program takes " + listed(value.shape) + ", whole",
                              "pass that shape, or export a bundle for this one");
    }
}

Tensor part_of(const View& whole, const Value& value, const Mesh& mesh, int64_t rank) {
    Tensor part{value.dtype, local_shape(value, mesh), {}};
    part.bytes.resize(bytes_of(part.shape, part.dtype));
    each_row(value, mesh, rank,
             [&](int64_t from, int64_t to, int64_t bytes) { std::memcpy(&part.bytes[to], &whole.bytes[from], bytes); });
    return part;
}

void put_part(Tensor& whole, std::string_view part, const Value& value, const Mesh& mesh, int64_t rank) {
    each_row(value, mesh, rank,
             [&](int64_t to, int64_t from, int64_t bytes) { std::memcpy(&whole.bytes[to], &part[from], bytes); });
}

int64_t holder_of(const Value& value, const Mesh& mesh, int64_t rank) {
    for (size_t axis = 0; axis < mesh.axes.size(); ++axis) {
        bool sharded = std::any_of(value.sharding.begin(), value.sharding.end(),
                                   [&](const Sharding& s) { return s.axis == mesh.axes[axis].first; });
        if (!sharded) rank -= mesh.coordinate(rank, static_cast<int>(axis)) * mesh.stride(static_cast<int>(axis));
    }
    return rank;
}

void check_weights(const SafeTensors& stored, const std::vector<Segment>& segments, const std::string& path) {
    for (const auto& segment : segments)
        for (const auto& binding : segment.inputs) {
            if (!binding.is_weight()) continue;
            auto found = stored.tensors().find(binding.source.name);
            if (found == stored.tensors().end())
                throw bundle_error("the weight " + in_quotes(binding.source.name) + " is not in " + path +
                                       ", which has " + std::to_string(stored.tensors().size()) + " others",
                                   "copy the bundle again, whole, or export it again");
            const View& view = found->second;
            if (view.dtype != binding.dtype || view.shape != binding.source_shape())
                throw bundle_error("weight " + in_quotes(binding.source.name) + " is " + std::string(view.dtype->name) +
                                       " " + listed(view.shape) + " in " + path + ", and the manifest says " +
                                       std::string(binding.dtype->name) + " " + listed(binding.source_shape()),
                                   "copy the bundle again, whole, or export it again");
        }
}

std::string transposed(const View& tensor) {
    constexpr int64_t kBlock = 64; // rows and columns that are moved together: both sides then stay in the cache
    int64_t rows = tensor.shape[0], columns = tensor.shape[1], size = tensor.dtype->itemsize;
    std::string out(tensor.bytes.size(), '\0');
    for (int64_t row0 = 0; row0 < rows; row0 += kBlock)
        for (int64_t column0 = 0; column0 < columns; column0 += kBlock)
            for (int64_t column = column0; column < std::min(columns, column0 + kBlock); ++column)
                for (int64_t row = row0; row < std::min(rows, row0 + kBlock); ++row)
                    std::memcpy(&out[(column * rows + row) * size], &tensor.bytes[(row * columns + column) * size],
                                size);
    return out;
}

} // namespace mdtrt
