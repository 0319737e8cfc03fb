// Work shared among threads, for the C++ kernels beside it; needs no OpenMP.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Calls worker(next) on so many threads, the caller's among them. next() gives 0, 1, 2, … over all
// of them together, each once; a worker goes on until it is given more than there is to do.
template <typename Worker>
void on_threads(int64_t threads, const Worker& worker) {
    std::atomic<int64_t> given{0};
    const auto next = [&given] { return given.fetch_add(1, std::memory_order_relaxed); };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) others.emplace_back([&] { worker(next); });
    worker(next);
    for (std::thread& other : others) other.join();
}
