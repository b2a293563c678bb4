#include "core/tensors.h"

#include <numeric>

#include "samples.h"

using namespace mdtrt;

static Tensor counted(const Shape& shape) {
    Tensor tensor{dtype_of("int32"), shape, {}};
    std::vector<int32_t> values(elements_of(shape));
    std::iota(values.begin(), values.end(), 0);
    tensor.bytes.assign(reinterpret_cast<const char*>(values.data()), values.size() * 4);
    return tensor;
}

static std::vector<int32_t> values(const Tensor& tensor) {
    auto* data = reinterpret_cast<const int32_t*>(tensor.bytes.data());
    return {data, data + tensor.bytes.size() / 4};
}

static std::string stored(const std::string& header, const std::string& data, size_t length = 0) {
    std::string file;
    uint64_t size = length ? length : header.size();
    for (int shift = 0; shift < 64; shift += 8) file += static_cast<char>(size >> shift & 255);
    return file + header + data;
}

TEST_CASE("a part is the rank's chunk, dim by dim, and all parts put back are the whole") {
    Mesh mesh{{{"dp", 2}, {"tp", 3}}};
    for (const auto& sharding : std::vector<std::vector<Sharding>>{{},
                                                                   {{0, "dp"}},
                                                                   {{1, "tp"}},
                                                                   {{2, "dp"}},
                                                                   {{1, "tp"}, {2, "dp"}},
                                                                   {{1, "dp"}, {1, "tp"}},
                                                                   {{1, "tp"}, {1, "dp"}},
                                                                   {{0, "dp"}, {1, "tp"}}}) {
        Value value{"x", {2, 6, 4}, dtype_of("int32"), sharding};
        Tensor whole = counted(value.shape), again = whole;
        again.bytes.assign(whole.bytes.size(), '\xff');
        for (int rank = 0; rank < 6; ++rank) {
            Tensor part = part_of(whole.view(), value, mesh, rank);
            CHECK(part.shape == local_shape(value, mesh));
            int holder = static_cast<int>(holder_of(value, mesh, rank));
            CHECK(holder <= rank);
            CHECK(part_of(whole.view(), value, mesh, holder).bytes == part.bytes);
            if (holder == rank) put_part(again, part.bytes, value, mesh, rank);
        }
        CHECK(again.bytes == whole.bytes);
    }
    Value value{"x", {2, 6}, dtype_of("int32"), {{1, "tp"}}};
    CHECK(values(part_of(counted(value.shape).view(), value, mesh, 4)) == std::vector<int32_t>{2, 3, 8, 9});
    Value twice{"x", {12}, dtype_of("int32"), {{0, "tp"}, {0, "dp"}}};
    CHECK(values(part_of(counted(twice.shape).view(), twice, mesh, 4)) ==
          std::vector<int32_t>{6, 7}); // tp 1, then dp 1 of that
    Value empty{"x", {0, 6}, dtype_of("int32"), {{1, "tp"}}};
    CHECK(part_of(counted(empty.shape).view(), empty, mesh, 1).bytes.empty());
    Value scalar{"x", {}, dtype_of("int32"), {}};
    CHECK(part_of(counted({}).view(), scalar, mesh, 1).bytes.size() == 4);
}

TEST_CASE("what is written is read") {
    Folder folder;
    Tensor a = counted({2, 3}), b{dtype_of("bfloat16"), {2}, "abcd"}, c{dtype_of("bool"), {0, 3}, ""},
           d{dtype_of("float64"), {}, "12345678"};
    std::string path = folder.path + "/t.safetensors";
    write_safetensors(path, {{"a", a.view()}, {"b", b.view()}, {"c", c.view()}, {"d", d.view()}});
    SafeTensors file(Mapped(path), path);
    CHECK(file.tensors().size() == 4);
    CHECK(file.tensors().at("a").bytes == a.bytes);
    CHECK(file.tensors().at("b").dtype == dtype_of("bfloat16"));
    CHECK(file.tensors().at("c").shape == Shape{0, 3});
    CHECK(file.tensors().at("d").bytes == "12345678");
    CHECK_SAYS(raised([&] { write_safetensors(folder.path + "/no/where", {}); }), "cannot be written");
    CHECK(std::distance(std::filesystem::directory_iterator(folder.path), {}) == 1); // nothing half written
}

TEST_CASE("a file that is not whole is refused") {
    Folder folder;
    auto refusal = [&](const std::string& bytes) {
        std::string path = folder.write("w", bytes);
        return raised([&] { SafeTensors(Mapped(path), path); });
    };
    std::string entry = R"({"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}})";
    CHECK(refusal(stored(entry, "12345678")).empty());
    CHECK(refusal(stored(R"({"__metadata__":{"k":"v"}})", "")).empty());
    CHECK_SAYS(refusal(""), "it has 0 bytes");
    CHECK_SAYS(refusal(stored(entry, "12345678", 1ull << 62)), "its header has");
    CHECK_SAYS(refusal(stored(entry, "1234567")), "cannot lie at 0 to 8 of 7");
    CHECK_SAYS(refusal(stored(entry, "123456789")), "belong to no tensor");
    CHECK_SAYS(refusal(stored(R"({"a":{"dtype":"I32","shape":[3],"data_offsets":[0,8]}})", "12345678")), "cannot lie");
    CHECK_SAYS(
        refusal(stored(R"({"a":{"dtype":"I32","shape":[4611686018427387904,4],"data_offsets":[0,8]}})", "12345678")),
        "cannot lie");
    CHECK_SAYS(refusal(stored(R"({"a":{"dtype":"I32","shape":[-2],"data_offsets":[0,8]}})", "12345678")), "cannot lie");
    CHECK_SAYS(refusal(stored(R"({"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}})", "12345678")),
               "'X9' is not known");
    CHECK_SAYS(
        refusal(stored(
            R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[6],"data_offsets":[2,8]}})",
            "12345678")),
        "one behind the other");
    CHECK_SAYS(
        refusal(stored(
            R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"I8","shape":[4],"data_offsets":[4,8]}})",
            "12345678")),
        "is twice");
}

TEST_CASE("inputs that are not the program's are refused, naming both sides") {
    Manifest manifest = parse_manifest(sample("engines"), "m");
    Tensor x{dtype_of("float32"), {4, 8}, std::string(128, '\0')}, mask{dtype_of("bool"), {4}, std::string(4, '\0')};
    auto refusal = [&](std::map<std::string, View> inputs) { return raised([&] { check_inputs(inputs, manifest); }); };
    CHECK(refusal({{"x", x.view()}, {"mask.0", mask.view()}}).empty());
    CHECK_SAYS(refusal({{"x", x.view()}}), "the input 'mask.0' is missing");
    CHECK_SAYS(refusal({{"x", x.view()}, {"mask.0", mask.view()}, {"y", x.view()}}),
               "no input 'y'; they take x float32[4, 8], mask.0 bool[4]");
    Tensor half{dtype_of("float32"), {2, 8}, std::string(64, '\0')};
    CHECK_SAYS(refusal({{"x", half.view()}, {"mask.0", mask.view()}}),
               "shape [2, 8] and the program takes [4, 8], whole");
    CHECK_SAYS(refusal({{"x", mask.view()}, {"mask.0", mask.view()}}), "is bool and the engines take float32");
}

TEST_CASE("weights are compared with what segments take, and transposed where they are taken so") {
    Folder folder;
    Manifest manifest = parse_manifest(sample("two_axes"), "m");
    Tensor up{dtype_of("bfloat16"), {16, 8}, std::string(256, 'w')},
        turned{dtype_of("bfloat16"), {8, 16}, std::string(256, 'w')};
    auto refusal = [&](const char* name, const Tensor& tensor) {
        std::string path = folder.path + "/w.safetensors";
        write_safetensors(path, {{name, tensor.view()}});
        SafeTensors file(Mapped(path), path);
        return raised([&] { check_weights(file, manifest.ranks[0], path); });
    };
    CHECK(refusal("up", up).empty());
    CHECK_SAYS(refusal("down", up), "the weight 'up' is not in");
    CHECK_SAYS(refusal("up", turned), "is bfloat16 [8, 16] in");
    Tensor matrix = counted({100, 70});
    Tensor other{matrix.dtype, {70, 100}, transposed(matrix.view())};
    CHECK(values(other)[1] == 70);
    CHECK(values(other)[100] == 1);
    CHECK(transposed(other.view()) == matrix.bytes);
}
