// TensorRT's runtime, engines and execution contexts.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "core/guard.h"
#include "core/manifest.h"
#include "trt/gpu.h"

namespace mdtrt {

class Runtime;

// An engine that was read from a file; several contexts may run it.
class Engine {
  public:
    ~Engine();
    int64_t scratch_bytes() const; // that its activations need while it runs

  private:
    friend class Runtime;
    friend class Context;
    struct State;
    explicit Engine(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

class Runtime {
  public:
    // `library` was opened by open_tensorrt.  Ask gpu::count first: without a driver TensorRT may return garbage.
    explicit Runtime(const Library& library);
    ~Runtime();

    // Raises Error (LaunchError): TensorRT refuses these bytes on this GPU.
    std::unique_ptr<Engine> load(std::string_view plan, const std::string& file, const std::string& built_for);

  private:
    friend class Context;
    struct State;
    std::unique_ptr<State> state_;
};

// One segment, ready to be enqueued on its tensors, which lie where they always do.
class Context {
  public:
    // `scratch` is memory of at least `scratch_bytes()` that contexts share which run one after another on one stream;
    // null: it has its own.  Raises Error: BundleError where the engine's tensors are not the segment's, LaunchError
    // where there is no room.
    Context(Runtime& runtime, Engine& engine, const Segment& segment, const std::string& name, void* scratch,
            int64_t scratch_bytes);
    ~Context();

    void set_communicator(void* communicator); // raises Error (CommunicatorError): the engine refuses it
    void set_address(const std::string& tensor, void* address);
    void enqueue(gpu::Stream stream);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

} // namespace mdtrt
