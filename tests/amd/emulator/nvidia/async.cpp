#include "async.h"

#include <cstring>
#include <map>
#include <vector>

#include "simt.h"

namespace simt {
namespace {

struct Copy {
  void* dst;
  const void* src;
  int bytes, group;
};
struct Sum {
  float* dst;
  const float* src;
  int count;
};
struct Thread {
  std::vector<Copy> copies;
  std::vector<Sum> sums;
  int groups = 0;
};
std::map<unsigned, Thread> threads;  // those that have something under way

Thread& mine() { return threads[self->thread.x]; }

}  // namespace

void cp_async(void* dst, const void* src, int bytes) {
  if (reinterpret_cast<uintptr_t>(dst) % 16 || (bytes && reinterpret_cast<uintptr_t>(src) % 16))
    fail("cp.async: an address that is not a multiple of 16");
  if (bytes < 0 || bytes > 16) fail("cp.async: %d bytes", bytes);
  touch(dst, 16, true);
  std::memset(dst, 0xff, 16);
  Thread& t = mine();
  t.copies.push_back({dst, src, bytes, t.groups});
}

void cp_async_commit_group() { ++mine().groups; }

void cp_async_wait_group(int newest) {
  Thread& t = mine();
  std::vector<Copy> left;
  for (const Copy& copy : t.copies)
    if (copy.group < t.groups - newest) {
      touch(copy.dst, 16, true);
      std::memset(copy.dst, 0, 16);
      std::memcpy(copy.dst, copy.src, copy.bytes);
    } else {
      left.push_back(copy);
    }
  t.copies = std::move(left);
}

void cp_reduce_async_bulk_add(float* dst, const float* src, int bytes) {
  if ((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | bytes) % 16)
    fail("cp.reduce.async.bulk: an address or size that is not a multiple of 16");
  mine().sums.push_back({dst, src, bytes / 4});
}

void cp_async_bulk_wait_group() {
  for (const Sum& sum : mine().sums)
    for (int i = 0; i < sum.count; ++i) {
      touch(sum.src + i, sizeof(float), false);
      sum.dst[i] += sum.src[i];
    }
  mine().sums.clear();
}

void fence_proxy_async() {}

// Nothing may be under way when a thread returns.
[[maybe_unused]] const bool checked_at_return = [] {
  at_return = [] {
    const auto found = threads.find(self->thread.x);
    if (found == threads.end()) return;
    const bool idle = found->second.copies.empty() && found->second.sums.empty();
    threads.erase(found);
    if (!idle) fail("thread %u returns while its copies are under way", self->thread.x);
  };
  return true;
}();

}  // namespace simt
