// The CUDA runtime: this rank's GPU.  All raise Error (LaunchError) where CUDA fails.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

struct CUstream_st;
struct CUevent_st;
struct CUgraphExec_st;

namespace mdtrt::gpu {

using Stream = CUstream_st*;

int count(); // raises Error where no GPU can be used, and says why
void use(int device);
struct Info {
    std::string name, uuid, capability; // NVIDIA H200, 32 hexadecimal digits, 9.0
};
Info info(int device);
int64_t used_memory(); // bytes of this GPU, by all processes
int driver_version();  // 13000 is 13.0

Stream make_stream(); // never the default one: on that, TensorRT synchronizes, and nothing can be captured
void wait(Stream stream);

class Memory {
  public:
    explicit Memory(int64_t bytes);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    char* data() const { return data_; }

  private:
    char* data_ = nullptr;
};

void copy_to_gpu(void* to, std::string_view from);                           // done when it returns
void copy_to_host(char* to, const void* from, int64_t bytes, Stream stream); // done when it returns

class Event {
  public:
    Event();
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(Stream stream);
    bool done() const; // true, too, where the GPU failed: who uses it next is told
    double milliseconds_since(const Event& start) const;

  private:
    CUevent_st* event_ = nullptr;
};

// What is enqueued on a stream between `begin` and `end`, to be launched as one.
class Graph {
  public:
    static void begin(Stream stream);
    explicit Graph(Stream stream); // ends the capture; raises Error where it failed
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    void launch(Stream stream) const;
    static void discard(Stream stream); // ends a capture that failed, if it is one

  private:
    CUgraphExec_st* graph_ = nullptr;
};

// Let this thread query events while another one captures; for the watchdog's.
void begin_watching(int device);

} // namespace mdtrt::gpu
