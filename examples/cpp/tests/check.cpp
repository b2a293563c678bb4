// What tests/cpp asks of the core: each command prints one line of JSON for each thing that it was asked about.
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <sys/resource.h>

#include "core/error.h"
#include "core/guard.h"
#include "core/json.h"
#include "core/manifest.h"
#include "core/selftest.h"
#include "core/sha256.h"
#include "core/tensors.h"

namespace {

using namespace mdtrt;
using Chance = std::mt19937_64;

std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

size_t below(Chance& chance, size_t most) { return most ? chance() % most : 0; }

// What a reader may take for something else: limits, other types, names that mean something.
Json strange(Chance& chance) {
    static const std::vector<Json> kValues = {nullptr,
                                              true,
                                              false,
                                              int64_t{0},
                                              int64_t{-1},
                                              int64_t{1},
                                              int64_t{2},
                                              int64_t{65},
                                              int64_t{1} << 31,
                                              int64_t{1} << 40,
                                              INT64_MAX,
                                              INT64_MIN,
                                              0.5,
                                              1e308,
                                              std::string(),
                                              std::string("self"),
                                              std::string("../x"),
                                              std::string("/dev/zero"),
                                              std::string(1, '\0'),
                                              std::string("float99"),
                                              std::string("cp"),
                                              std::string("weight"),
                                              std::string("value"),
                                              std::string("engine"),
                                              std::string("manifest.json"),
                                              std::string(300, 'x'),
                                              Json::Array{},
                                              Json::Object{},
                                              Json::Array(70, Json(int64_t{0})),
                                              Json::Array{INT64_MAX, INT64_MAX, INT64_MAX},
                                              Json::Array{std::string("weight"), std::string("up")}};
    return kValues[below(chance, kValues.size())];
}

size_t count(const Json& json) {
    size_t found = 1;
    if (std::string(json.kind()) == "a list")
        for (const Json& part : json.array()) found += count(part);
    if (std::string(json.kind()) == "an object")
        for (const auto& part : json.object()) found += count(part.second);
    return found;
}

// The value with the `at`-th of its parts changed.
Json changed(const Json& json, size_t& at, Chance& chance) {
    if (at-- == 0) {
        if (std::string(json.kind()) == "an integer" && chance() % 2)
            return static_cast<int64_t>(static_cast<uint64_t>(json.integer()) + chance() % 3 - 1);
        return strange(chance);
    }
    if (std::string(json.kind()) == "a list") {
        Json::Array parts;
        for (const Json& part : json.array()) {
            bool here = at == 0;
            parts.push_back(at == SIZE_MAX ? part : changed(part, at, chance));
            if (here && chance() % 4 == 0) parts.pop_back();      // left out
            if (here && chance() % 4 == 0) parts.push_back(part); // or twice
        }
        return parts;
    }
    if (std::string(json.kind()) == "an object") {
        Json::Object parts;
        for (const auto& [name, part] : json.object()) {
            bool here = at == 0;
            Json value = at == SIZE_MAX ? part : changed(part, at, chance);
            if (here && chance() % 4 == 0) continue;
            parts.emplace_back(here && chance() % 4 == 0 ? "y" : name, std::move(value));
        }
        return parts;
    }
    return json;
}

std::string changed_bytes(std::string data, Chance& chance) {
    static const std::vector<std::string> kInserts = {"[", "\"",   "{",       "\xff", std::string(30, '9'),
                                                      "-", "null", "\\u0000", ","};
    for (size_t times = size_t{1} << below(chance, 4); times; --times) {
        size_t at = below(chance, data.size() + 1), length = std::min(data.size() - at, size_t{1} << below(chance, 7));
        switch (chance() % 4) {
        case 0:
            for (size_t i = 0; i < length; ++i) data[at + i] = static_cast<char>(chance());
            break;
        case 1: data.erase(at, length); break;
        case 2: data.insert(at, data.substr(at, length)); break;
        default: data.insert(at, kInserts[below(chance, kInserts.size())]);
        }
    }
    return data;
}

// Each of many damaged texts is read or is a named refusal, soon and in little memory.
template <class F> int damage(int times, F damaged_and_read) {
    rusage before, now;
    getrusage(RUSAGE_SELF, &before);
    int refused = 0;
    double slowest = 0;
    for (int i = 0; i < times; ++i) {
        Chance chance(i);
        auto start = std::chrono::steady_clock::now();
        try {
            damaged_and_read(chance);
        } catch (const Error& error) {
            ++refused;
            if (error.problem.empty() || error.fix.empty())
                throw std::logic_error("mutation " + std::to_string(i) + " has an Error that says nothing");
        } catch (const std::exception& error) {
            throw std::logic_error("mutation " + std::to_string(i) + " is no Error: " + error.what());
        }
        slowest = std::max(slowest, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    getrusage(RUSAGE_SELF, &now);
    std::cout << Json(Json::Object{{"times", int64_t{times}},
                                   {"refused", int64_t{refused}},
                                   {"slowest", slowest},
                                   {"memory_kib", int64_t{now.ru_maxrss - before.ru_maxrss}}})
                     .text()
              << "\n";
    return 0;
}

int hostile_manifests(const std::string& folder, int times) {
    std::vector<std::string> texts;
    std::vector<Json> samples;
    for (const char* name : {"engines", "parts", "two_axes", "given"}) {
        samples.push_back(Json::parse(read(folder + "/" + name + ".json")));
        texts.push_back(samples.back().text());
        parse_manifest(texts.back(), "m"); // before it is damaged it is read
    }
    return damage(times, [&](Chance& chance) {
        size_t which = below(chance, samples.size());
        std::string text = texts[which];
        if (chance() % 2) {
            text = changed_bytes(text, chance);
        } else {
            Json json = samples[which];
            for (size_t more = 1 + below(chance, 3); more; --more) {
                size_t at = below(chance, count(json));
                json = changed(json, at, chance);
            }
            text = json.text();
        }
        check_runnable(parse_manifest(text, "m"));
    });
}

int hostile_safetensors(const std::string& path, int times) {
    std::string whole = read(path), aside = path + ".damaged";
    size_t header = 8 + static_cast<unsigned char>(whole[0]) + 256 * static_cast<unsigned char>(whole[1]);
    return damage(times, [&](Chance& chance) {
        std::string text = changed_bytes(whole.substr(8, header - 8), chance), length;
        uint64_t size = chance() % 8 ? text.size() : chance();
        for (int shift = 0; shift < 64; shift += 8) length += static_cast<char>(size >> shift & 255);
        std::ofstream(aside, std::ios::binary) << length << text << whole.substr(header);
        SafeTensors file(Mapped(aside), aside);
        for (const auto& tensor : file.tensors()) sha256(tensor.second.bytes); // all of it can be read
    });
}

// For each file of a folder whether it is a manifest, and why not.
int manifests(const std::string& folder) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        Json problem = nullptr;
        try {
            parse_manifest(read(entry.path()), "m");
        } catch (const Error& error) { problem = error.problem; }
        std::cout << Json(Json::Object{{"file", entry.path().filename().string()}, {"problem", problem}}).text()
                  << "\n";
    }
    return 0;
}

int dtype_table() {
    for (const auto& info : dtypes())
        std::cout << Json(Json::Object{{"name", std::string(info.name)},
                                       {"itemsize", int64_t{info.itemsize}},
                                       {"safetensors", std::string(info.safetensors)}})
                         .text()
                  << "\n";
    return 0;
}

// Each rank's parts of the inputs of a manifest, and them put together again, written beside the file.
int parts(const std::string& manifest_path, const std::string& inputs) {
    Manifest manifest = parse_manifest(read(manifest_path), manifest_path);
    SafeTensors file{Mapped(inputs), inputs};
    check_inputs(file.tensors(), manifest);
    std::map<std::string, Tensor> again;
    for (int rank = 0; rank < manifest.mesh.size(); ++rank) {
        std::map<std::string, Tensor> mine;
        std::map<std::string, View> views;
        for (const auto& value : manifest.inputs) {
            mine[value.name] = part_of(file.tensors().at(value.name), value, manifest.mesh, rank);
            views[value.name] = mine[value.name].view();
            Tensor& whole = again[value.name];
            whole.dtype = value.dtype;
            whole.shape = value.shape;
            whole.bytes.resize(bytes_of(value.shape, value.dtype));
            if (holder_of(value, manifest.mesh, rank) == rank)
                put_part(whole, mine[value.name].bytes, value, manifest.mesh, rank);
        }
        write_safetensors(inputs + ".rank" + std::to_string(rank), views);
    }
    std::map<std::string, View> views;
    for (const auto& [name, tensor] : again) views[name] = tensor.view();
    write_safetensors(inputs + ".again", views);
    return 0;
}

Json numbers(const std::vector<float>& values) {
    Json::Array found;
    for (float value : values) found.push_back(static_cast<double>(value));
    return found;
}

// Of each op over this many ranks: what each rank puts in, and must get.
int self_tests(int ranks) {
    for (const char* op : {"all_reduce", "all_to_all", "broadcast", "all_gather", "reduce_scatter"})
        for (int rank = 0; rank < ranks; ++rank) {
            auto right = expected(op, ranks, rank);
            std::cout << Json(Json::Object{{"op", std::string(op)},
                                           {"rank", int64_t{rank}},
                                           {"operand", numbers(operand(ranks, rank))},
                                           {"expected", numbers(right)}})
                             .text()
                      << "\n";
        }
    return 0;
}

int guard(char** argv) {
    check_library(Library(argv[0], "TensorRT", ""),
                  {argv[1], std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]), std::atoi(argv[5])});
    std::cout << "the library is that\n";
    return 0;
}

} // namespace

int main(int argc, char** argv) {
    std::string command = argc > 1 ? argv[1] : "";
    try {
        if (command == "hostile-manifests" && argc == 4) return hostile_manifests(argv[2], std::atoi(argv[3]));
        if (command == "hostile-safetensors" && argc == 4) return hostile_safetensors(argv[2], std::atoi(argv[3]));
        if (command == "manifests" && argc == 3) return manifests(argv[2]);
        if (command == "self-tests" && argc == 3) return self_tests(std::atoi(argv[2]));
        if (command == "dtypes" && argc == 2) return dtype_table();
        if (command == "parts" && argc == 4) return parts(argv[2], argv[3]);
        if (command == "guard" && argc == 8) return guard(argv + 2);
    } catch (const Error& error) {
        std::fprintf(stderr, "%s: %s\n", error.kind.c_str(), error.what());
        return kFailed;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 3;
    }
    std::fprintf(stderr, "mdtrt_check hostile-manifests | hostile-safetensors | manifests | self-tests | dtypes | parts"
                         " | guard\n");
    return kUsage;
}
