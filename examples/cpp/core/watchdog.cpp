#include "core/watchdog.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <unistd.h>

#include "core/error.h"
#include "core/text.h"

namespace mdtrt {
namespace {

constexpr std::chrono::seconds kAbort{5};

double seconds(std::chrono::steady_clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

} // namespace

Watchdog::Watchdog(Options options) : options_(std::move(options)) {
    if (!options_.end_process) options_.end_process = [](int code) { _exit(code); };
    thread_ = std::thread([this] { run(); });
}

Watchdog::~Watchdog() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
    }
    condition_.notify_all();
    thread_.join();
}

void Watchdog::watch(std::function<bool()> is_done, std::string what) {
    std::lock_guard<std::mutex> lock(mutex_);
    waits_.push_back({std::move(is_done), std::move(what), Clock::now()});
    condition_.notify_all();
}

Watchdog::Waiting::Waiting(Watchdog& watchdog, std::string what) : done_(std::make_shared<std::atomic<bool>>(false)) {
    watchdog.watch([done = done_] { return done->load(); }, std::move(what));
}

void Watchdog::peer_ended(std::string problem, double grace) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!ended_.empty()) return;
    ended_ = std::move(problem);
    ended_deadline_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(grace));
    condition_.notify_all();
}

void Watchdog::run() {
    options_.begin_thread();
    std::unique_lock<std::mutex> lock(mutex_);
    std::string message;
    while (message.empty()) {
        drop_done();
        if (closed_) return;
        if (waits_.empty()) {
            condition_.wait(lock);
            continue;
        }
        auto now = Clock::now();
        std::string who = "rank " + std::to_string(options_.rank);
        double waited = seconds(now - std::max(waits_.front().start, last_done_));
        char times[64];
        std::snprintf(times, sizeof times, " waited %.1f s (at most %g) for ", waited, options_.timeout);
        if (waited > options_.timeout)
            message = who + times + waits_.front().what +
                      "\nAnother rank has failed, has ended, or did not make this call; its output says why.";
        if (!ended_.empty() && now > ended_deadline_)
            message = ended_ + "\n" + who + " was waiting for " + waits_.front().what + ".";
        if (message.empty())
            condition_.wait_for(lock, std::chrono::duration<double>(std::min(options_.poll, options_.timeout / 4)));
    }
    lock.unlock();
    expire(message);
}

void Watchdog::drop_done() {
    while (!waits_.empty() && waits_.front().is_done()) {
        waits_.pop_front();
        last_done_ = Clock::now();
    }
}

void Watchdog::expire(const std::string& message) {
    std::fprintf(stderr, "torchtrt_md: %s This process ends with exit code %d.\n", message.c_str(), kDeadline);
    std::fflush(stderr);
    // NCCL's abort may itself hang.
    auto aborted = std::make_shared<std::atomic<bool>>(false);
    std::thread([abort = options_.abort, aborted] {
        abort();
        *aborted = true;
    }).detach();
    for (auto start = Clock::now(); !*aborted && Clock::now() - start < kAbort;)
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    options_.end_process(kDeadline);
}

std::string waits_for(const std::vector<Segment>& segments, const Mesh& mesh, int rank) {
    constexpr size_t kMost = 8;
    std::string text;
    for (size_t i = 0; i < segments.size(); ++i) {
        const Segment& segment = segments[i];
        if (!segment.axis || segment.collectives.empty()) continue;
        std::vector<std::string> lines, members;
        for (int member : mesh.group(rank, mesh.find(*segment.axis))) members.push_back(std::to_string(member));
        for (size_t at = 0; at < segment.collectives.size();) {
            const Collective& c = segment.collectives[at];
            size_t run = at;
            while (run < segment.collectives.size() && segment.collectives[run].op == c.op &&
                   segment.collectives[run].dtype == c.dtype && segment.collectives[run].elements == c.elements)
                ++run;
            lines.push_back("  " + c.op + " of " + std::to_string(c.elements) + " x " + std::string(c.dtype->name) +
                            (run - at > 1 ? ", " + std::to_string(run - at) + " times" : ""));
            at = run;
        }
        if (lines.size() > kMost) {
            std::string more = "  ... and " + std::to_string(lines.size() - kMost + 1) + " more";
            lines.resize(kMost - 1);
            lines.push_back(more);
        }
        text += (text.empty() ? "" : "\n") + segment_name(segment, i) + " on axis " + in_quotes(*segment.axis) +
                " (ranks " + joined(members) + "); it is in one of, in this order:";
        for (const auto& line : lines) text += "\n" + line;
    }
    return text.empty() ? "a program without collectives: its GPU hangs, or works for others" : text;
}

} // namespace mdtrt
