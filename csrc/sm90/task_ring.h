// Tasks of a thread block that stays: one thread takes them from a counter that all thread blocks share,
// one ahead of those that work on them, so that the next one's tiles are loaded while this one is finished.
#pragma once
#include "mbarrier.h"

namespace flash_ext::sm90 {

template <typename Task>
struct TaskRing {
  static constexpr int kStages = 2;
  Place place[kStages];
  Task task[kStages];
  bool any[kStages];  // else there are no more

  FX_DEVICE void init(int readers) {
    for (Place& x : place) x.init(readers);
  }

  // One thread: of all `count` tasks, some. make(n) is the n-th one; what has nothing to do is left out.
  template <typename Make>
  FX_DEVICE void take(int* counter, int count, Make make) {
    for (RingPosition<kStages> at;; at.advance()) {
      Task next;
      bool is_any;
      do {
        const int n = atomicAdd(counter, 1);
        is_any = n < count;
        if (is_any) next = make(n);
      } while (is_any && next.is_empty());
      place[at.stage].wait_empty(at.parity);
      any[at.stage] = is_any;
      if (is_any) task[at.stage] = next;
      place[at.stage].full.arrive();
      if (!is_any) return;
    }
  }
  // f(task) for each, by a reader: a warp whose lanes all have read the task when f ends, or its first lane.
  template <typename F>
  FX_DEVICE void for_each(F f) {
#pragma unroll 1
    for (RingPosition<kStages> at;; at.advance()) {
      place[at.stage].wait_full(at.parity);
      if (!any[at.stage]) return;
      f(task[at.stage]);
      place[at.stage].release();
    }
  }
};

}  // namespace flash_ext::sm90
