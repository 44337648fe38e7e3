// How a thread block adds its part to dq, which all blocks of keys of a group share.
#pragma once
#include "../tile/atomic.h"
#include "../tile/reg_tile.h"
#include "bwd_task.h"

namespace flash_ext {

// Every thread calls, for each block of rows: prepare, a barrier, add, a barrier, hand_over; and
// finish at the end.
//
// Where there is a copy engine that adds, sums pass through shared memory, and the engine works
// while the next block of rows is computed. Elsewhere each thread adds its own.
//
// In deterministic mode blocks of keys take turns. A thread block waits only for such of lower
// index, which the hardware starts before it.
template <typename Config, typename Smem>
class DqSum {
 public:
  FX_DEVICE DqSum(const BwdArgs& args, const BwdTask& task, const Smem& smem)
      : args(args), task(task), smem(smem) {}

  FX_DEVICE void prepare(int block) const {
    if (threadIdx.x != 0) return;
    if constexpr (!Config::kAsyncDq) wait_for_turn(block);
    else if (!args.turns) wait_add_async_read();
    else if (block + 1 < task.block_end) finish(block + 1);
  }

  // dq of the block's rows += ds k, with ds = [keys, rows] in shared memory.
  FX_DEVICE void add(int block) const {
    using Atom = MmaAtom<typename Config::T>;
    constexpr int kRows = Config::kTile.dq_rows;
#pragma unroll
    for (int i = 0; i < Config::kDqParts; ++i) {
      const int part = static_cast<int>(warp_id()) * Config::kDqParts + i;
      const int part_row = part / Config::kDqColParts * kRows;
      const int part_col = part % Config::kDqColParts * kAtom;
      const ColumnsOf k_cols(smem.k(), part_col);
      typename Config::DqPart dq;
      dq.clear();
      mma_steps<Config::kBlockKV / kAtom>(
          dq,
          [&](int m, int k) {
            return Atom::load_a_transposed(smem.ds(), part_row + m * kAtom, k * kAtom);
          },
          [&](int n, int k) {
            return Atom::load_b_transposed(k_cols, n * kAtom * Config::kDqColParts, k * kAtom);
          });
      if constexpr (Config::kAsyncDq) {
        dq.put_rows(
            [&](int m, int slot) {
              const int row = part_row + dq.row(m, slot);
              const int flip = static_cast<int>((task.first_row + row) % 4 * 8);
              return Place{smem.dq() + row * kHeadDim, flip ^ part_col};
            },
            [](float* at, float a, float b) { *reinterpret_cast<float2*>(at) = {a, b}; });
      } else {
        dq.put_rows(
            [&](int m, int slot) {
              const int row = block * Config::kBlockQ + part_row + dq.row(m, slot);
              return Place{row < task.rows ? sums() + row * int64_t{kHeadDim} + part_col : nullptr,
                           0};
            },
            [](float* at, auto... x) { add_to(at, x...); });
      }
    }
    if constexpr (Config::kAsyncDq) publish_to_add_async();
    else if (args.turns)
      __threadfence();  // this thread's part is there before the turn is passed on
  }

  FX_DEVICE void hand_over(int block) const {
    if (threadIdx.x != 0) return;
    if constexpr (Config::kAsyncDq) {
      wait_for_turn(block);
      const int row0 = block * Config::kBlockQ;
      const int rows = std::min(task.rows, row0 + Config::kBlockQ) - row0;
      add_async(sums() + row0 * int64_t{kHeadDim}, smem.dq(), rows * kHeadDim);
    } else if (args.turns) {
      store_release(counter(block), turn(block) + 1);
    }
  }

  FX_DEVICE void finish(int last_block) const {
    if (!Config::kAsyncDq || threadIdx.x != 0) return;
    wait_add_async();
    if (args.turns) store_release(counter(last_block), turn(last_block) + 1);
  }

 private:
  static constexpr int kHeadDim = Config::kHeadDim;
  struct Place {
    float* address;
    int flip;
  };

  // How many blocks of keys add to a block of rows before this one: all from the first that its
  // first row sees.
  FX_DEVICE int turn(int block) const {
    const int first_key = task.query(block * Config::kBlockQ) - task.left;
    return task.key0 / Config::kBlockKV - std::max(first_key, 0) / Config::kBlockKV;
  }
  FX_DEVICE void wait_for_turn(int block) const {
    if (!args.turns) return;
    const int mine = turn(block);
    while (load_acquire(counter(block)) != mine) {}
  }

  // Computed where they are needed: registers are dear.
  FX_DEVICE float* sums() const { return args.dq + task.first_row * kHeadDim; }
  FX_DEVICE int* counter(int block) const {
    return args.turns + int64_t{task.group} * args.blocks_q + block;
  }

  const BwdArgs& args;
  const BwdTask& task;
  const Smem& smem;
};

}  // namespace flash_ext
