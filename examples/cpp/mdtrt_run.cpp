// Run a bundle on the GPUs of a launch: inputs from a safetensors file, outputs to one.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <iostream>
#include <unistd.h>

#include "core/launch.h"
#include "core/rendezvous.h"
#include "core/sha256.h"
#include "core/text.h"
#include "mdtrt.h"

namespace {

using namespace mdtrt;

struct Arguments {
    std::string bundle, inputs, outputs, report;
    int repeat = 0;
    bool cuda_graph = false;
    Options options;
};

double monotonic() { // the clock that Python's time.monotonic() reads, the same for all processes of a host
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// KiB of this process, of /proc/self/status: VmHWM is the most it ever held, RssAnon what is no file's.
int64_t status(const std::string& name) {
    std::ifstream file("/proc/self/status");
    std::string word;
    int64_t value = 0;
    while (file >> word)
        if (word == name + ":" && file >> value) return value;
    return 0;
}

Json hashes(const std::map<std::string, Tensor>& tensors) {
    Json::Object found;
    for (const auto& [name, tensor] : tensors) found.emplace_back(name, sha256(tensor.bytes));
    return found;
}

SafeTensors read_inputs(Program& program, const std::string& path) {
    SafeTensors inputs = program.ranks().together("reading the inputs", [&] {
        try {
            return SafeTensors(Mapped(path), path);
        } catch (const Error& error) { throw Error("InputError", error.problem, error.fix); }
    });
    auto digests = program.ranks().gather(sha256(inputs.bytes()), "the inputs' hash");
    for (size_t rank = 1; rank < digests.size(); ++rank)
        if (digests[rank].string() != digests[0].string()) {
            Error error("RankMismatchError",
                        "ranks 0 and " + std::to_string(rank) + " have different inputs in " + path,
                        "give every rank the same file; each takes its part");
            error.agreed = true;
            throw error;
        }
    return inputs;
}

// On rank 0 the whole outputs: a sharded one is put together from the first rank that holds each part.
std::map<std::string, Tensor> whole_outputs(Program& program, std::map<std::string, Tensor> mine) {
    const Manifest& manifest = program.manifest();
    Rendezvous& ranks = program.ranks();
    auto sends = [&](const Value& value, int rank) {
        return !value.sharding.empty() && holder_of(value, manifest.mesh, rank) == rank;
    };
    std::vector<int64_t> sizes(ranks.size(), 0);
    std::string data;
    for (const auto& value : manifest.outputs)
        for (int rank = 0; rank < ranks.size(); ++rank)
            if (sends(value, rank)) sizes[rank] += bytes_of(local_shape(value, manifest.mesh), value.dtype);
    for (const auto& value : manifest.outputs)
        if (sends(value, ranks.rank())) data += mine.at(value.name).bytes;
    auto sent = ranks.collect(data, sizes, "the outputs");
    if (ranks.rank() != 0) return {};
    std::vector<size_t> at(ranks.size(), 0);
    for (const auto& value : manifest.outputs) {
        if (value.sharding.empty()) continue;
        Tensor whole{value.dtype, value.shape, {}};
        whole.bytes.resize(bytes_of(value.shape, value.dtype));
        size_t size = bytes_of(local_shape(value, manifest.mesh), value.dtype);
        for (int rank = 0; rank < ranks.size(); ++rank) {
            if (!sends(value, rank)) continue;
            put_part(whole, std::string_view(sent[rank]).substr(at[rank], size), value, manifest.mesh, rank);
            at[rank] += size;
        }
        mine[value.name] = std::move(whole);
    }
    return mine;
}

std::string summary(const Json& reports) {
    std::string text;
    for (const Json& report : reports.array()) {
        std::vector<double> times;
        for (const Json& time : report.find("times_ms")->array()) times.push_back(time.number());
        std::sort(times.begin(), times.end());
        char line[200];
        if (times.empty())
            std::snprintf(line, sizeof line, "rank %lld: ran\n",
                          static_cast<long long>(report.find("rank")->integer()));
        else
            std::snprintf(line, sizeof line, "rank %lld: median %.3f ms, fastest %.3f, slowest %.3f, of %zu calls\n",
                          static_cast<long long>(report.find("rank")->integer()), times[times.size() / 2],
                          times.front(), times.back(), times.size());
        text += line;
    }
    return text;
}

void run(const Arguments& arguments) {
    auto program = Program::load(arguments.bundle, arguments.options);
    Rendezvous& ranks = program->ranks();
    SafeTensors inputs = read_inputs(*program, arguments.inputs);
    auto outputs = program->run(inputs.tensors());
    double first_answer = monotonic();
    Json first = hashes(outputs);
    bool replayed = arguments.cuda_graph && program->capture();
    Json::Array times;
    if (arguments.repeat)
        for (double time : program->time(arguments.repeat)) times.emplace_back(time);
    else if (replayed)
        program->call();
    outputs = program->outputs();

    Json::Object seconds, versions;
    for (const auto& [about, took] : program->seconds()) seconds.emplace_back(about, took);
    for (const auto& [name, version] : program->versions()) versions.emplace_back(name, version);
    Json mine = Json::Object{
        {"rank", static_cast<int64_t>(ranks.rank())},
        {"host", ranks.hosts()[ranks.rank()]},
        {"versions", std::move(versions)},
        {"seconds", std::move(seconds)},
        {"first_answer_monotonic", first_answer},
        {"cuda_graph", replayed},
        {"times_ms", std::move(times)},
        {"first_outputs", std::move(first)},
        {"outputs", hashes(outputs)},
        {"gpu_memory_bytes", program->gpu_memory()},
        {"host_memory_kib",
         Json::Object{{"peak", status("VmHWM")}, {"now", status("VmRSS")}, {"anonymous", status("RssAnon")}}}};
    Json reports = ranks.gather(mine, "the ranks' reports");
    auto whole = whole_outputs(*program, std::move(outputs));
    ranks.together("writing what came of it", [&] {
        if (ranks.rank() != 0) return;
        std::map<std::string, View> views;
        for (const auto& [name, tensor] : whole) views[name] = tensor.view();
        if (!arguments.outputs.empty()) write_safetensors(arguments.outputs, views);
        if (!arguments.report.empty())
            write_text(arguments.report, Json(Json::Object{{"bundle", arguments.bundle},
                                                           {"manifest_sha256", program->manifest().digest},
                                                           {"mesh", program->manifest().mesh.text()},
                                                           {"repeat", static_cast<int64_t>(arguments.repeat)},
                                                           {"ranks", reports}})
                                                 .text() +
                                             "\n");
        std::cout << summary(reports) << std::flush;
    });
    program->leave();
}

int parse(Arguments& arguments, int argc, char** argv) {
    CLI::App app{"Run a bundle of torchtrt_md on the GPUs of a launch, one process for each rank.\n\n"
                 "  torchrun --no-python --nproc_per_node=2 mdtrt_run flux.mdtrt --inputs in.safetensors --outputs "
                 "out.safetensors"};
    app.add_option("BUNDLE", arguments.bundle, "The bundle's folder.")->required();
    app.add_option("--inputs", arguments.inputs,
                   "A safetensors file with the whole inputs, by name; each rank takes its part.")
        ->required();
    app.add_option("--outputs", arguments.outputs, "Rank 0 writes the whole outputs there, by name.");
    app.add_option("--repeat", arguments.repeat, "Timed calls, after the first one and 5 that warm up.")
        ->check(CLI::Range(0, 1000000));
    app.add_flag("--cuda-graph", arguments.cuda_graph, "Capture a call in a CUDA graph and replay it.");
    app.add_option("--report", arguments.report, "Rank 0 writes there what was measured, as JSON.");
    app.add_option("--timeout", arguments.options.timeout, "Seconds that any wait on another rank may take.")
        ->capture_default_str()
        ->check(CLI::Range(0.1, 1e6));
    app.add_option("--tensorrt", arguments.options.tensorrt, "TensorRT's library; by default the loader looks for it.");
    app.add_option("--nccl", arguments.options.nccl, "NCCL's library; by default the loader looks for it.");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& error) { return app.exit(error) ? kUsage : -1; }
    return 0;
}

// For messages: of the launcher's variables, whichever these are.
std::string own_rank() {
    try {
        return std::to_string(launch_from(process_environment, 1).rank);
    } catch (const Error&) { return "-"; }
}

} // namespace

int main(int argc, char** argv) {
    Arguments arguments;
    if (int code = parse(arguments, argc, argv)) return code < 0 ? 0 : code;
    int code = 0;
    try {
        run(arguments);
    } catch (const Error& error) {
        std::fprintf(stderr, "[rank %s] %s: %s\n", own_rank().c_str(), error.kind.c_str(), error.what());
        code = kFailed;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "mdtrt_run: %s\n", error.what());
        code = kFailed;
    }
    std::fflush(stdout);
    std::fflush(stderr);
    _exit(code); // the destructors of CUDA and NCCL may wait on peers that are gone
}
