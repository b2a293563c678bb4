// Run a bundle of torchtrt_md from C++: one process for each rank, one GPU for each process.
//
//     mdtrt::Options options;
//     auto program = mdtrt::Program::load("flux.mdtrt", options);
//     auto outputs = program->run(inputs); // whole inputs by name; this rank's parts of the outputs by name
//     program->leave();
//
// Every rank makes the same calls in the same order, from one thread.  What fails on one rank raises the same Error on
// all.  A process that waits for too long ends with exit code 70.  After an Error the process should end: the GPU may
// be in a collective that its peers never come to.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/manifest.h"
#include "core/tensors.h"

namespace mdtrt {

struct Options {
    double timeout = 300; // seconds that any wait on another rank may take
    std::string tensorrt; // TensorRT's library; "" for its own name on the loader's path
    std::string nccl;     // NCCL's
};

class Rendezvous;

class Program {
  public:
    // Collective.  Raises Error on all ranks: the bundle, the libraries, the GPUs or the launch are not what they must
    // be, or one of the bundle's self-tests gives a wrong result.
    static std::unique_ptr<Program> load(const std::string& bundle, const Options& options = {});
    ~Program(); // after leave(): lets go of the GPU's memory; else of nothing, since that could wait without end

    // All of a call: set_inputs, call, outputs.
    std::map<std::string, Tensor> run(const std::map<std::string, View>& inputs);

    // Copy this rank's parts of the inputs, which are whole, to the GPU.  All ranks vote on them before any copies.
    // Raises Error (InputError): they are not those of the program.
    void set_inputs(const std::map<std::string, View>& inputs);
    // Enqueue a call on the inputs that are set.  Raises Error (LaunchError): an engine could not be run.
    void call();
    // Wait for all calls that were enqueued.
    void wait();
    // This rank's parts of the outputs of the last call.
    std::map<std::string, Tensor> outputs();

    // Replay the calls that follow as a CUDA graph; after the first call.  Collective: where a rank cannot, no rank
    // does, and it returns false, with the reason on stderr.
    bool capture();
    // Milliseconds of each of `times` calls that are enqueued back to back, measured on the GPU, after 5 others.
    std::vector<double> time(int times);

    const Manifest& manifest() const;
    Rendezvous& ranks();
    // Where a tensor lies on the GPU: an input before a call, an output after it, this rank's part.
    void* address(const std::string& kind, const std::string& name) const;
    const std::vector<std::pair<std::string, double>>& seconds() const; // what loading took, step by step
    const std::map<std::string, std::string>& versions() const;         // of what was loaded; the GPU's name and uuid
    int64_t gpu_memory() const;                                         // bytes that loading took, of all processes

    // This rank's work is done.  Collective.
    void leave();

  private:
    struct State;
    explicit Program(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

} // namespace mdtrt
