#include "mdtrt.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <optional>
#include <set>

#include "core/plan.h"
#include "core/rendezvous.h"
#include "core/selftest.h"
#include "core/sha256.h"
#include "core/text.h"
#include "core/watchdog.h"
#include "trt/engine.h"
#include "trt/gpu.h"
#include "trt/library.h"
#include "trt/nccl.h"

namespace mdtrt {
namespace {

constexpr int kWarmUp = 5;

struct Communicator {
    const Nccl* nccl;
    void* pointer;
};

std::string_view bytes_in(const std::vector<float>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

struct SelfTest {
    std::unique_ptr<Context> context;
    std::unique_ptr<gpu::Memory> x, y;
};

} // namespace

// In the order of what needs what: the last is let go of first.
struct Program::State {
    std::string folder;
    Options options;
    Manifest manifest;
    std::map<std::string, Mapped> files; // engines and weights of this rank, by their paths in the bundle
    std::unique_ptr<Rendezvous> ranks;
    std::optional<Library> tensorrt;
    std::optional<Nccl> nccl;
    int device = 0;
    std::map<std::string, std::string> versions;
    std::vector<std::pair<std::string, double>> seconds;
    int64_t gpu_memory = 0;
    std::unique_ptr<Watchdog> watchdog;
    std::map<std::string, Communicator> communicators; // by axis
    std::unique_ptr<Runtime> runtime;
    std::map<std::string, std::unique_ptr<Engine>> engines; // by their files
    std::unique_ptr<gpu::Memory> scratch, memory;
    Plan plan;
    gpu::Stream stream = nullptr;
    std::vector<std::unique_ptr<Context>> contexts; // in the order in which they run
    std::vector<SelfTest> tests;                    // as in the manifest, until all have passed
    std::unique_ptr<gpu::Graph> graph;
    std::string waits_for;
    bool left = false;

    const std::vector<Segment>& segments() const { return manifest.ranks[ranks->rank()]; }
    std::string name(size_t segment) const { return segment_name(segments()[segment], segment); }

    template <class F> void step(const std::string& about, F work) {
        auto start = std::chrono::steady_clock::now();
        ranks->together(about, work);
        seconds.emplace_back(about, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }

    // The axes that engines of any rank communicate on: the same on all ranks.
    std::set<std::string> communicating_axes() const {
        std::set<std::string> axes;
        for (const auto& rank : manifest.ranks)
            for (const auto& segment : rank)
                if (segment.axis) axes.insert(*segment.axis);
        return axes;
    }

    void join();
    void read();
    void open_libraries();
    void find_gpu();
    void connect();
    void load_engines();
    void make_contexts();
    void bind_communicators();
    void make_self_tests();
    void run_self_test(size_t index);
    void run_self_tests();
    void place_tensors();
    void enqueue();
};

void Program::State::join() {
    std::optional<Error> unread;
    try {
        manifest = read_manifest(folder);
    } catch (const Error& error) {
        unread = error; // raised when all ranks are there, so that none waits for this one
    }
    Launch launch = launch_from(process_environment, unread ? 1 : static_cast<int>(manifest.mesh.size()));
    auto start = std::chrono::steady_clock::now();
    ranks = std::make_unique<Rendezvous>(launch, options.timeout);
    seconds.emplace_back("joining the launch",
                         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    step("reading the bundle", [&] {
        if (unread) throw *unread;
        read();
    });
    auto digests = ranks->gather(manifest.digest, "the bundle's hash");
    for (int rank = 1; rank < ranks->size(); ++rank)
        if (digests[rank].string() != digests[0].string()) {
            auto error =
                launch_error("the ranks have different bundles: by the manifest's sha256, rank 0 has " +
                                 in_quotes(digests[0].string().substr(0, 12)) + ", rank " + std::to_string(rank) +
                                 " has " + in_quotes(digests[rank].string().substr(0, 12)),
                             "copy the same bundle to every host");
            error.agreed = true;
            throw error;
        }
}

void Program::State::read() {
    if (manifest.mesh.size() != ranks->size())
        throw Error("MeshError",
                    manifest.mesh.text() + " has " + std::to_string(manifest.mesh.size()) +
                        " ranks and the launch has " + std::to_string(ranks->size()),
                    "launch " + std::to_string(manifest.mesh.size()) + " processes");
    check_runnable(manifest);
    check_versions(manifest, compiled_flavour());
    std::set<std::string> needed;
    for (const auto& segment : segments()) needed.insert(segment.file);
    for (const auto& test : manifest.self_tests) needed.insert(test.file);
    if (const auto& weights = manifest.weights[ranks->rank()]) needed.insert(*weights);
    for (const auto& file : needed) {
        Mapped& mapped = files[file] = Mapped(folder, file);
        std::string found = sha256(mapped.bytes());
        if (found != manifest.files.at(file))
            throw bundle_error(folder + "/" + file + " is damaged: its sha256 is " + found + " and the manifest says " +
                                   manifest.files.at(file),
                               "copy the bundle again, whole, or export it again");
    }
}

void Program::State::open_libraries() {
    step("loading the libraries", [&] {
        if (!communicating_axes().empty()) nccl.emplace(options.nccl); // before TensorRT, which opens NCCL by name
        tensorrt.emplace(open_tensorrt(options.tensorrt));
        Flavour flavour = compiled_flavour();
        versions[flavour.name] = flavour.version();
        versions[flavour.name + "'s library"] = tensorrt->path();
        if (nccl) versions["NCCL"] = nccl->version();
        if (nccl) versions["NCCL's library"] = nccl->path();
    });
}

void Program::State::find_gpu() {
    std::string told;
    int64_t before = 0;
    step("finding a GPU", [&] {
        int found = gpu::count();
        device = ranks->local_rank();
        if (device >= found)
            throw launch_error(
                "local rank " + std::to_string(device) + " has no GPU of its own: " + ranks->hosts()[ranks->rank()] +
                    " has " + std::to_string(found),
                "launch the bundle's " + std::to_string(ranks->size()) + " ranks on hosts that have a GPU for each");
        gpu::use(device);
        gpu::Info info = gpu::info(device);
        before = gpu::used_memory(); // makes the context
        versions["GPU"] = info.name;
        versions["GPU's uuid"] = info.uuid;
        versions["compute capability"] = info.capability;
        versions["CUDA driver"] = std::to_string(gpu::driver_version());
        told = ranks->hosts()[ranks->rank()] + " GPU " + std::to_string(device) + " (" + info.uuid + ")";
        stream = gpu::make_stream();
    });
    gpu_memory = before;
    std::map<std::string, int> owners;
    auto gpus = ranks->gather(told, "the ranks' GPUs");
    for (int rank = 0; rank < ranks->size(); ++rank) {
        auto [owner, alone] = owners.emplace(gpus[rank].string(), rank);
        if (alone) continue;
        auto error = launch_error(
            "ranks " + std::to_string(owner->second) + " and " + std::to_string(rank) + " share " + owner->first,
            "launch with a local rank for each process, and as many GPUs as processes on each host");
        error.agreed = true;
        throw error;
    }
}

void Program::State::connect() {
    Watchdog::Options watching;
    watching.timeout = options.timeout;
    watching.rank = ranks->rank();
    watching.begin_thread = [device = device] { gpu::begin_watching(device); };
    watching.abort = [this] {
        for (auto& [axis, communicator] : communicators) communicator.nccl->abort(communicator.pointer);
    };
    watchdog = std::make_unique<Watchdog>(watching);
    ranks->on_peer_ended([this](const std::string& problem) { watchdog->peer_ended(problem); });

    const Mesh& mesh = manifest.mesh;
    const auto axes = communicating_axes();
    Json::Object ids; // of the groups that this rank is the first of
    ranks->together("the ids of NCCL", [&] {
        for (const auto& axis : axes)
            if (mesh.coordinate(ranks->rank(), mesh.find(axis)) == 0) ids.emplace_back(axis, hex(nccl->unique_id()));
    });
    auto all = ranks->gather(Json(std::move(ids)), "the ids of NCCL");
    step("the communicators", [&] {
        for (const auto& axis : axes) {
            auto group = mesh.group(ranks->rank(), mesh.find(axis));
            const Json* id = all[group[0]].find(axis);
            if (!id)
                throw launch_error("rank " + std::to_string(group[0]) + " gave no NCCL id for axis " + in_quotes(axis));
            Watchdog::Waiting waiting(*watchdog, "the NCCL communicator of axis " + in_quotes(axis) + ", " +
                                                     ranks_named(group, 0));
            int place = static_cast<int>(mesh.coordinate(ranks->rank(), mesh.find(axis)));
            communicators[axis] = {&*nccl, nccl->make(static_cast<int>(group.size()), unhex(id->string()), place)};
        }
    });
}

void Program::State::load_engines() {
    step("loading the engines", [&] {
        runtime = std::make_unique<Runtime>(*tensorrt);
        std::string built_for =
            manifest.target + " (this GPU: " + versions["GPU"] + ", " + versions["compute capability"] + ")";
        for (const auto* list : {&std::as_const(manifest).self_tests, &segments()})
            for (const auto& segment : *list) {
                auto file = files.find(segment.file);
                if (file == files.end()) continue; // it is loaded already
                engines[segment.file] = runtime->load(file->second.bytes(), folder + "/" + segment.file, built_for);
                files.erase(file); // TensorRT has what it needs of it
            }
    });
}

void Program::State::make_contexts() {
    step("making the engines' contexts", [&] {
        int64_t most = 1;
        for (const auto& segment : segments()) most = std::max(most, engines.at(segment.file)->scratch_bytes());
        if (segments().size() > 1) scratch = std::make_unique<gpu::Memory>(most); // they run one after another
        for (size_t i = 0; i < segments().size(); ++i)
            contexts.push_back(std::make_unique<Context>(*runtime, *engines.at(segments()[i].file), segments()[i],
                                                         name(i), scratch ? scratch->data() : nullptr, most));
    });
}

// It may be a handshake of the ranks, so all are there, and none may wait for ever.
void Program::State::bind_communicators() {
    step("binding the communicators", [&] {
        for (size_t i = 0; i < contexts.size(); ++i) {
            if (!segments()[i].axis) continue;
            Watchdog::Waiting waiting(*watchdog, "binding the communicator of " + name(i));
            contexts[i]->set_communicator(communicators.at(*segments()[i].axis).pointer);
        }
    });
}

void Program::State::make_self_tests() {
    step("making the self-tests' contexts", [&] {
        for (const Segment& test : manifest.self_tests) {
            const Binding &x = test.inputs.at(0), &y = test.outputs.at(0);
            // With scratch of their own: they are small.
            tests.push_back({std::make_unique<Context>(*runtime, *engines.at(test.file), test, test.name, nullptr, 0),
                             std::make_unique<gpu::Memory>(bytes_of(x.shape, x.dtype)),
                             std::make_unique<gpu::Memory>(bytes_of(y.shape, y.dtype))});
            tests.back().context->set_address(x.name, tests.back().x->data());
            tests.back().context->set_address(y.name, tests.back().y->data());
        }
    });
    step("binding the self-tests' communicators", [&] {
        for (size_t i = 0; i < tests.size(); ++i) {
            const Segment& test = manifest.self_tests[i];
            Watchdog::Waiting waiting(*watchdog, "binding the communicator of " + test.name);
            tests[i].context->set_communicator(communicators.at(*test.axis).pointer);
        }
    });
}

void Program::State::run_self_test(size_t index) {
    const Segment& test = manifest.self_tests[index];
    const Mesh& mesh = manifest.mesh;
    const Binding& y = test.outputs.at(0);
    int axis = mesh.find(*test.axis);
    int64_t place = mesh.coordinate(ranks->rank(), axis), ranks_of_axis = mesh.axes[axis].second;
    // A run that writes nothing must not pass.
    std::vector<float> result(elements_of(y.shape), std::nanf(""));
    step("running " + test.name, [&] {
        std::vector<float> x = operand(ranks_of_axis, place);
        gpu::copy_to_gpu(tests[index].x->data(), bytes_in(x));
        gpu::copy_to_gpu(tests[index].y->data(), bytes_in(result));
        Watchdog::Waiting waiting(*watchdog, test.name + ", " + ranks_named(mesh.group(ranks->rank(), axis), 0));
        tests[index].context->enqueue(stream);
        gpu::wait(stream);
        gpu::copy_to_host(reinterpret_cast<char*>(result.data()), tests[index].y->data(),
                          static_cast<int64_t>(bytes_in(result).size()), stream);
    });
    Flavour flavour = compiled_flavour();
    auto wrong = judge(test, result, place, flavour.name + " " + flavour.version());
    ranks->vote(wrong ? &*wrong : nullptr, test.name);
}

void Program::State::run_self_tests() {
    if (manifest.self_tests.empty()) return;
    make_self_tests();
    for (size_t i = 0; i < tests.size(); ++i) run_self_test(i);
    step("letting go of the self-tests", [&] {
        Watchdog::Waiting waiting(*watchdog, "letting go of the self-tests");
        tests.clear();
        std::set<std::string> needed;
        for (const auto& segment : segments()) needed.insert(segment.file);
        for (const auto& test : manifest.self_tests)
            if (!needed.count(test.file)) engines.erase(test.file);
    });
}

void Program::State::place_tensors() {
    step("placing the tensors", [&] {
        int rank = ranks->rank();
        plan = plan_memory(manifest, rank);
        memory = std::make_unique<gpu::Memory>(plan.bytes);
        const Mesh& mesh = manifest.mesh;
        for (size_t axis = 0; axis < mesh.axes.size(); ++axis) {
            auto at = static_cast<int32_t>(mesh.coordinate(rank, static_cast<int>(axis)));
            gpu::copy_to_gpu(memory->data() + plan.places.at({"coordinate", mesh.axes[axis].first}).offset,
                             {reinterpret_cast<const char*>(&at), sizeof at});
        }
        if (!plan.weights.empty()) {
            const std::string& file = *manifest.weights[rank];
            SafeTensors stored(std::move(files.at(file)), folder + "/" + file);
            check_weights(stored, segments(), folder + "/" + file);
            for (const auto& [key, place] : plan.weights) {
                const View& weight = stored.tensors().at(key.first);
                gpu::copy_to_gpu(memory->data() + place.offset,
                                 key.second ? std::string_view(transposed(weight)) : weight.bytes);
            }
        }
        files.clear();
        for (size_t i = 0; i < contexts.size(); ++i)
            for (const auto* bindings : {&segments()[i].inputs, &segments()[i].outputs})
                for (const Binding& binding : *bindings)
                    contexts[i]->set_address(binding.name, memory->data() + plan.of(binding).offset);
        waits_for = mdtrt::waits_for(segments(), mesh, rank);
        gpu_memory = gpu::used_memory() - gpu_memory;
    });
}

void Program::State::enqueue() {
    for (auto& context : contexts) context->enqueue(stream);
}

Program::Program(std::unique_ptr<State> state) : state_(std::move(state)) {}

std::unique_ptr<Program> Program::load(const std::string& bundle, const Options& options) {
    auto state = std::make_unique<State>();
    state->folder = bundle;
    state->options = options;
    std::unique_ptr<Program> program(new Program(std::move(state)));
    State& s = *program->state_;
    s.join();
    s.open_libraries();
    s.find_gpu();
    s.connect();
    s.load_engines();
    s.make_contexts();
    s.bind_communicators();
    s.run_self_tests(); // every engine that communicates has its communicator, and none has run
    s.place_tensors();
    return program;
}

Program::~Program() {
    if (!state_) return;
    if (state_->ranks) state_->ranks->on_peer_ended(nullptr);
    if (!state_->left) {
        // TensorRT and NCCL may wait for peers that are gone, so only the launch is left, and it tells the others.
        state_->ranks.reset();
        state_.release();
        return;
    }
    State& s = *state_;
    {
        Watchdog::Waiting waiting(*s.watchdog, "letting go of the engines");
        s.graph.reset(); // TensorRT waits without end for graphs that hold an engine with collectives
        s.contexts.clear();
        s.engines.clear();
        s.runtime.reset();
        for (auto& [axis, communicator] : s.communicators) communicator.nccl->destroy(communicator.pointer);
        s.communicators.clear();
        s.memory.reset();
        s.scratch.reset();
    }
    s.watchdog.reset();
}

std::map<std::string, Tensor> Program::run(const std::map<std::string, View>& inputs) {
    set_inputs(inputs);
    call();
    return outputs();
}

void Program::set_inputs(const std::map<std::string, View>& inputs) {
    State& s = *state_;
    s.ranks->together("a call", [&] { check_inputs(inputs, s.manifest); });
    wait(); // a call under way reads those that are there
    for (const auto& value : s.manifest.inputs) {
        void* to = address("input", value.name);
        const View& whole = inputs.at(value.name);
        if (value.sharding.empty())
            gpu::copy_to_gpu(to, whole.bytes);
        else
            gpu::copy_to_gpu(to, part_of(whole, value, s.manifest.mesh, s.ranks->rank()).bytes);
    }
}

void Program::call() {
    State& s = *state_;
    if (s.graph)
        s.graph->launch(s.stream);
    else
        s.enqueue();
    auto event = std::make_shared<gpu::Event>();
    event->record(s.stream);
    s.watchdog->watch([event] { return event->done(); }, s.waits_for);
}

void Program::wait() { gpu::wait(state_->stream); }

std::map<std::string, Tensor> Program::outputs() {
    State& s = *state_;
    std::map<std::string, Tensor> found;
    for (const auto& value : s.manifest.outputs) {
        Tensor& part = found[value.name] = {value.dtype, local_shape(value, s.manifest.mesh), {}};
        part.bytes.resize(bytes_of(part.shape, part.dtype));
        gpu::copy_to_host(part.bytes.data(), address("output", value.name), static_cast<int64_t>(part.bytes.size()),
                          s.stream);
    }
    return found;
}

bool Program::capture() {
    State& s = *state_;
    wait();
    std::string problem;
    try {
        gpu::Graph::begin(s.stream);
        s.enqueue();
        s.graph = std::make_unique<gpu::Graph>(s.stream);
    } catch (const Error& error) {
        problem = error.problem;
        gpu::Graph::discard(s.stream);
    }
    auto problems = s.ranks->gather(problem, "a CUDA graph");
    for (int rank = 0; rank < s.ranks->size(); ++rank) {
        if (problems[rank].string().empty()) continue;
        s.graph.reset();
        if (s.ranks->rank() == 0)
            std::fprintf(
                stderr,
                "torchtrt_md: rank %d could not capture a CUDA graph, and calls run without one on all ranks: %s\n",
                rank, problems[rank].string().c_str());
        return false;
    }
    return true;
}

std::vector<double> Program::time(int times) {
    State& s = *state_;
    for (int i = 0; i < kWarmUp; ++i) call();
    wait();
    s.ranks->vote(nullptr, "the start of the timing");
    std::vector<std::pair<std::unique_ptr<gpu::Event>, std::unique_ptr<gpu::Event>>> events;
    for (int i = 0; i < times; ++i) {
        events.emplace_back(std::make_unique<gpu::Event>(), std::make_unique<gpu::Event>());
        events.back().first->record(s.stream);
        call();
        events.back().second->record(s.stream);
    }
    wait();
    std::vector<double> milliseconds;
    for (const auto& [begin, end] : events) milliseconds.push_back(end->milliseconds_since(*begin));
    return milliseconds;
}

const Manifest& Program::manifest() const { return state_->manifest; }
Rendezvous& Program::ranks() { return *state_->ranks; }
const std::vector<std::pair<std::string, double>>& Program::seconds() const { return state_->seconds; }
const std::map<std::string, std::string>& Program::versions() const { return state_->versions; }
int64_t Program::gpu_memory() const { return state_->gpu_memory; }

void* Program::address(const std::string& kind, const std::string& name) const {
    return state_->memory->data() + state_->plan.places.at({kind, name}).offset;
}

void Program::leave() {
    wait();
    state_->ranks->leave();
    state_->left = true;
}

} // namespace mdtrt
