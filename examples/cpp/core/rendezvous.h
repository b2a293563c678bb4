// The ranks of a launch, over TCP through rank 0: all of them go on, or all raise the same error.
//
// A vote has a number.  Each rank sends rank 0 its ballot, with its error and its value; rank 0 sends all ballots to
// all.  A rank is given up after `timeout` seconds of silence, and at once where its process has ended.  Work is not
// silence: while a rank is in `together` a thread says so, however long the step takes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/connection.h"
#include "core/error.h"
#include "core/json.h"
#include "core/launch.h"

namespace mdtrt {

class Rendezvous {
  public:
    // Seconds that other ranks give rank 0 beyond the timeout, which it may need to hear that another one is missing.
    static constexpr double kGrace = 10;

    // Collective: all ranks of the launch come, or each raises Error (LaunchError), naming those that did not.
    Rendezvous(Launch launch, double timeout, double grace = kGrace);
    ~Rendezvous();
    Rendezvous(const Rendezvous&) = delete;
    Rendezvous& operator=(const Rendezvous&) = delete;

    int rank() const { return launch_.rank; }
    int size() const { return launch_.size; }
    int local_rank() const { return local_rank_; } // of the launcher, else among the ranks of this host
    const std::vector<std::string>& hosts() const { return hosts_; }

    // Called from another thread when the process of a rank has ended before it said that it would; until this is called
    // with null, behind which nothing is called any more.
    void on_peer_ended(std::function<void(std::string)> told);

    // Say whether this rank is fine, with an error or null; return if all are.  Raises Error on all ranks, else.
    void vote(const Error* error, const std::string& about);

    // Do a step that may fail on some ranks, then vote.
    template <class F> auto together(const std::string& about, F step) {
        if constexpr (std::is_void_v<decltype(step())>) {
            together_(about, [&] { step(); });
        } else {
            std::unique_ptr<decltype(step())> result;
            together_(about, [&] { result = std::make_unique<decltype(step())>(step()); });
            return std::move(*result);
        }
    }

    // Every rank's value, in rank order.
    std::vector<Json> gather(const Json& value, const std::string& about);

    // The bytes of all ranks on rank 0, nothing elsewhere.  `sizes` are those that the ranks send, known to all.
    std::vector<std::string> collect(std::string_view mine, const std::vector<int64_t>& sizes,
                                     const std::string& about);

    // This rank's work is done; collective.
    void leave();

  private:
    struct Ballot;
    struct Peer {
        std::shared_ptr<Connection> connection;
        std::map<int64_t, std::string> ballots; // by the number of the vote
        SteadyClock::time_point heard;
        std::string lost; // how, where it is
        bool left = false;
        std::string data;
        int64_t data_size = 0; // that is expected
    };
    struct Stranger {
        std::shared_ptr<Connection> connection;
        SteadyClock::time_point since;
    };

    void together_(const std::string& about, const std::function<void()>& step);
    std::vector<Ballot> exchange(const Ballot& mine);
    void close();
    std::string verdict_of_all(const Ballot& mine);
    std::string verdict_of_rank_0(const Ballot& mine);
    void listen();
    void join();
    std::shared_ptr<Connection> joined(const std::string& host, int port, const std::string& token, double seconds,
                                       std::string& refused);
    void run();
    void welcome(std::vector<Stranger>& strangers);
    bool greet(const Stranger& stranger, const std::string& hello);
    void hear(int rank, const Message& message);
    void lose(int rank, const std::string& how);
    std::string hello(const std::string& token) const;

    Launch launch_;
    double timeout_, grace_;
    std::string token_;
    int local_rank_ = 0;
    std::vector<std::string> hosts_;
    std::vector<Peer> peers_; // on rank 0 one for each rank, else rank 0 alone
    std::unique_ptr<Listener> listener_;
    std::atomic<int64_t> number_{0};
    std::atomic<int> working_{0};
    std::atomic<bool> closing_{false}, accepting_{false}, leaving_{false};
    std::function<void(std::string)> told_;
    std::string first_loss_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::thread thread_;
};

} // namespace mdtrt
