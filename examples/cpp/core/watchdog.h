// The watchdog: a process that waits on another rank for too long says what for, and ends.
//
// A rank that failed or took another branch leaves its peers' GPUs in a collective that never returns.  NCCL inside an
// engine has no deadline of its own, so this thread is the deadline.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "core/manifest.h"

namespace mdtrt {

class Watchdog {
  public:
    struct Options {
        double timeout = 300;                       // seconds for each piece of work
        int rank = 0;                               // for the message
        std::function<void()> abort = [] {};        // before the end, best effort: abort the communicators
        std::function<void(int)> end_process;       // by default _exit, without clean-up that would wait
        std::function<void()> begin_thread = [] {}; // on the watchdog's own thread, before it does anything
        double poll = 0.05;                         // seconds between two looks
    };
    explicit Watchdog(Options options);
    ~Watchdog();

    // Expect this work to be done in time.  Work is taken to be done in the order in which it is handed over, and the
    // time of each begins when the one before it is done.
    void watch(std::function<bool()> is_done, std::string what);

    // Expect the scope, which blocks this thread, to be left in time.
    class Waiting {
      public:
        Waiting(Watchdog& watchdog, std::string what);
        ~Waiting() { *done_ = true; }

      private:
        std::shared_ptr<std::atomic<bool>> done_;
    };

    // Another rank has ended: what this one waits for then never comes.  Where it still waits for something after
    // `grace` seconds, the process ends.  In a vote it need not: that has an end of its own, and a better message.
    void peer_ended(std::string problem, double grace = 5);

  private:
    using Clock = std::chrono::steady_clock;
    struct Wait {
        std::function<bool()> is_done;
        std::string what;
        Clock::time_point start;
    };
    void run();
    void drop_done();
    void expire(const std::string& message);

    Options options_;
    std::deque<Wait> waits_;
    Clock::time_point last_done_ = Clock::now();
    std::string ended_;
    Clock::time_point ended_deadline_;
    bool closed_ = false;
    std::mutex mutex_;
    std::condition_variable condition_;
    std::thread thread_;
};

// What a call of these segments may be waiting in, for the watchdog.
std::string waits_for(const std::vector<Segment>& segments, const Mesh& mesh, int rank);

} // namespace mdtrt
