// The threads of a step: a team that sleeps between steps, and a barrier that spins within one.
#pragma once
#include <atomic>
#include <functional>
#include <thread>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

static inline void relax() {
#ifdef __x86_64__
    _mm_pause();
#endif
}

// All threads of a step meet here some 200 times, so waiting spins at first. On a busy machine the thread waited for
// may not even be running: then waiting sleeps, which leaves it a core and is woken at once.
class Barrier {
   public:
    explicit Barrier(int n_threads) : n_threads_(n_threads) {}
    void wait() {
        int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            phase_.notify_all();
            return;
        }
        for (int spins = 0; spins < kSpins; ++spins) {
            if (phase_.load(std::memory_order_acquire) != phase) return;
            relax();
        }
        phase_.wait(phase, std::memory_order_acquire);
    }

   private:
    static constexpr int kSpins = 1 << 15;
    const int n_threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> phase_{0};
};

// The caller is thread 0; the others sleep between steps, after a short spin in case the next one follows at once.
class Team {
   public:
    Team(int n_threads, std::function<void(int)> work) : work_(std::move(work)) {
        for (int thread = 1; thread < n_threads; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
    }
    ~Team() {
        stop_ = true;
        start();
        for (auto& worker : workers_) worker.join();
    }
    void run() {  // work ends with a barrier, so nobody is still busy when thread 0 returns
        start();
        work_(0);
    }

   private:
    void start() {
        started_.fetch_add(1, std::memory_order_release);
        started_.notify_all();
    }
    void serve(int thread) {
        for (int seen = 0;; ++seen) {
            for (int spins = 0; spins < 2000 && started_.load(std::memory_order_acquire) == seen; ++spins) relax();
            started_.wait(seen, std::memory_order_acquire);
            if (stop_) return;
            work_(thread);
        }
    }
    std::function<void(int)> work_;
    std::vector<std::thread> workers_;
    std::atomic<int> started_{0};
    std::atomic<bool> stop_{false};
};
