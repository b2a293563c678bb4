#include "trt/gpu.h"

#include <cstring>
#include <cuda_runtime_api.h>

#include "core/error.h"
#include "core/text.h"

namespace mdtrt::gpu {
namespace {

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw launch_error(std::string(what) + " failed on the GPU: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")",
                       "see the lines above it, and the output of the other ranks");
}

} // namespace

int count() {
    int found = 0;
    cudaError_t status = cudaGetDeviceCount(&found);
    if (status != cudaSuccess || found == 0)
        throw launch_error(std::string("there is no CUDA GPU that can be used: ") +
                               (status == cudaSuccess ? "none is visible" : cudaGetErrorString(status)),
                           "run engines on a machine with an NVIDIA GPU and its driver; see CUDA_VISIBLE_DEVICES");
    return found;
}

void use(int device) { check(cudaSetDevice(device), "choosing the GPU"); }

Info info(int device) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "asking for the GPU's properties");
    return {properties.name, hex({properties.uuid.bytes, sizeof properties.uuid.bytes}),
            std::to_string(properties.major) + "." + std::to_string(properties.minor)};
}

int64_t used_memory() {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for the GPU's memory");
    return static_cast<int64_t>(total - free);
}

int driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "asking for the driver's version");
    return version;
}

Stream make_stream() {
    Stream stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    return stream;
}

void wait(Stream stream) { check(cudaStreamSynchronize(stream), "a call"); }

Memory::Memory(int64_t bytes) {
    void* data = nullptr;
    if (cudaMalloc(&data, bytes) != cudaSuccess) {
        cudaGetLastError();
        throw launch_error("the GPU has no room for " + mebibytes(bytes),
                           "free GPU memory, or shard the model over more ranks");
    }
    data_ = static_cast<char*>(data);
}

Memory::~Memory() { cudaFree(data_); }

void copy_to_gpu(void* to, std::string_view from) {
    if (from.empty()) return;
    check(cudaMemcpy(to, from.data(), from.size(), cudaMemcpyHostToDevice), "copying to the GPU");
    // From memory that is not pinned it returns once the bytes are on their way, and no other stream waits for them.
    check(cudaStreamSynchronize(nullptr), "copying to the GPU");
}

void copy_to_host(char* to, const void* from, int64_t bytes, Stream stream) {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "copying from the GPU");
    wait(stream);
}

Event::Event() { check(cudaEventCreate(&event_), "making an event"); }
Event::~Event() { cudaEventDestroy(event_); }
void Event::record(Stream stream) { check(cudaEventRecord(event_, stream), "recording an event"); }
bool Event::done() const { return cudaEventQuery(event_) != cudaErrorNotReady; }

double Event::milliseconds_since(const Event& start) const {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start.event_, event_), "reading a time");
    return milliseconds;
}

void Graph::begin(Stream stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a graph");
}

Graph::Graph(Stream stream) {
    cudaGraph_t captured = nullptr;
    check(cudaStreamEndCapture(stream, &captured), "capturing a graph");
    cudaError_t status = cudaGraphInstantiate(&graph_, captured, 0);
    cudaGraphDestroy(captured);
    check(status, "making a graph");
}

Graph::~Graph() { cudaGraphExecDestroy(graph_); }

void Graph::launch(Stream stream) const { check(cudaGraphLaunch(graph_, stream), "launching a graph"); }

void Graph::discard(Stream stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaGraph_t captured = nullptr;
    if (cudaStreamIsCapturing(stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone)
        cudaStreamEndCapture(stream, &captured);
    if (captured) cudaGraphDestroy(captured);
    cudaGetLastError();
}

void begin_watching(int device) {
    cudaSetDevice(device);
    auto mode = cudaStreamCaptureModeThreadLocal; // this thread captures nothing, so only captures of its own count
    cudaThreadExchangeStreamCaptureMode(&mode);
}

} // namespace mdtrt::gpu
