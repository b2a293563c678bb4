#include "trt/engine.h"

#include <NvInferRuntime.h>
#include <algorithm>
#include <cstdio>

#include "core/error.h"
#include "core/plan.h"
#include "core/text.h"

namespace mdtrt {
namespace {

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) std::fprintf(stderr, "[TensorRT] %s\n", message);
    }
};

std::string dtype_name(nvinfer1::DataType dtype) {
    using nvinfer1::DataType;
    switch (dtype) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT64: return "int64";
    case DataType::kINT32: return "int32";
    case DataType::kINT8: return "int8";
    case DataType::kUINT8: return "uint8";
    case DataType::kBOOL: return "bool";
    case DataType::kFP8: return "float8_e4m3fn";
    default: return "TensorRT's dtype " + std::to_string(static_cast<int>(dtype));
    }
}

std::vector<Io> tensors_of(const nvinfer1::ICudaEngine& engine) {
    std::vector<Io> found;
    for (int i = 0; i < engine.getNbIOTensors(); ++i) {
        const char* name = engine.getIOTensorName(i);
        nvinfer1::Dims dims = engine.getTensorShape(name);
        found.push_back({name, engine.getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT,
                         dtype_name(engine.getTensorDataType(name)), Shape(dims.d, dims.d + std::max(dims.nbDims, 0))});
    }
    return found;
}

} // namespace

struct Engine::State {
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

struct Runtime::State {
    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
#ifdef TRT_MAJOR_RTX
    // TensorRT-RTX compiles its kernels when a context first runs: contexts that share this compile equal ones once.
    std::unique_ptr<nvinfer1::IRuntimeCache> cache;
#endif
};

struct Context::State {
    std::string name;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
};

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::~Engine() = default;

int64_t Engine::scratch_bytes() const { return state_->engine->getDeviceMemorySizeV2(); }

Runtime::Runtime(const Library& library) : state_(std::make_unique<State>()) {
    auto create = library.function<void* (*)(void*, int32_t)>("createInferRuntime_INTERNAL");
    state_->runtime.reset(static_cast<nvinfer1::IRuntime*>(create(&state_->logger, NV_TENSORRT_VERSION)));
    if (!state_->runtime) throw launch_error("TensorRT makes no runtime", "see the lines that TensorRT logged above");
}

Runtime::~Runtime() = default;

std::unique_ptr<Engine> Runtime::load(std::string_view plan, const std::string& file, const std::string& built_for) {
    auto state = std::make_unique<Engine::State>();
    state->engine.reset(state_->runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!state->engine)
        throw launch_error(
            "TensorRT does not load " + file + ", an engine built for " + built_for,
            "see the lines that TensorRT logged above; if the GPU is not the target, export again for this GPU");
    return std::unique_ptr<Engine>(new Engine(std::move(state)));
}

Context::Context(Runtime& runtime, Engine& engine, const Segment& segment, const std::string& name, void* scratch,
                 int64_t scratch_bytes)
    : state_(std::make_unique<State>()) {
    state_->name = name;
    nvinfer1::ICudaEngine& loaded = *engine.state_->engine;
    check_io(tensors_of(loaded), segment, name);
    if (!scratch) {
        state_->context.reset(loaded.createExecutionContext());
    } else {
        if (scratch_bytes < engine.scratch_bytes())
            throw launch_error(name + " was given " + mebibytes(scratch_bytes) + " for its activations, which need " +
                               mebibytes(engine.scratch_bytes()));
        std::unique_ptr<nvinfer1::IRuntimeConfig> config(loaded.createRuntimeConfig());
        if (!config) throw launch_error(name + " has no runtime config", "see the lines that TensorRT logged above");
        config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#ifdef TRT_MAJOR_RTX
        if (!runtime.state_->cache) runtime.state_->cache.reset(config->createRuntimeCache());
        if (runtime.state_->cache) config->setRuntimeCache(*runtime.state_->cache);
#else
        (void)runtime;
#endif
        state_->context.reset(loaded.createExecutionContext(config.get()));
        if (state_->context) state_->context->setDeviceMemoryV2(scratch, scratch_bytes);
    }
    if (!state_->context)
        throw launch_error(name + " has no room to run: its activations need " + mebibytes(engine.scratch_bytes()),
                           "free GPU memory, or shard the model over more ranks");
}

Context::~Context() = default;

void Context::set_communicator(void* communicator) {
    if (!state_->context->setCommunicator(communicator))
        throw Error("CommunicatorError",
                    state_->name + " refused its NCCL communicator; without it, it would compute wrong values",
                    "export the bundle again: its manifest says that this engine has collectives");
}

void Context::set_address(const std::string& tensor, void* address) {
    if (!state_->context->setTensorAddress(tensor.c_str(), address))
        throw launch_error(state_->name + " refused the address of " + in_quotes(tensor),
                           "please report it with the lines TensorRT logged");
}

void Context::enqueue(gpu::Stream stream) {
    if (!state_->context->enqueueV3(stream))
        throw launch_error(state_->name + " could not be run",
                           "see the lines that TensorRT logged above; the other ranks will end");
}

} // namespace mdtrt
