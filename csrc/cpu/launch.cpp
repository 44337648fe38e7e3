#include "launch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../attn/visible.h"
#include "dispatch.h"

namespace flash_ext::cpu {
namespace {

constexpr int64_t kTaskRows = 1024;  // so many rows share one packing of K and V
constexpr int64_t kMinTaskRows = 96;
constexpr int64_t kMinPartKeys = 512;     // a task gets no fewer keys when keys are split
constexpr size_t kKeptScratch = 8 << 20;  // bytes a thread keeps between calls
constexpr double kSerialWork =
    2e5;  // multiplications below which threads cost more than they bring

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// Runs run(i, scratch) for i in [0, count), each once, in about that order, on all threads.
template <typename Run>
void for_each_task(int64_t count, double work, Run run) {
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    Scratch& scratch = thread_scratch();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      scratch.reset();
      run(i, scratch);
    }
    scratch.reset();
    scratch.shrink(kKeptScratch);
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads <= 1 || work < kSerialWork) worker(0, 1);
  else torch::stable::parallel_for(0, threads, 1, worker);
}

std::vector<Sequence> sequences_of(const AttnParams& p) {
  std::vector<Sequence> all(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.cu_seqlens_q)
      all[b] = {b, p.cu_seqlens_q[b], p.cu_seqlens_k[b], p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b],
                p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]};
    else all[b] = {b, 0, 0, p.seq_q, p.seq_kv};
  }
  return all;
}

// Pairs of a query and a key that it sees, roughly, among some rows of one KV head.
double visible_pairs(const AttnParams& p, const Extent& t) {
  const int64_t rows = t.row_end - t.row_begin;
  if (rows <= 0 || t.kv_end <= t.kv_begin) return 0;
  const BandMask mask(p, t.seq.seq_q, t.seq.seq_kv);
  const auto seen = [&](int64_t query) {
    const KeyRange r = mask.visible(query);
    return double(std::max<int64_t>(std::min(r.end, t.kv_end) - std::max(r.begin, t.kv_begin), 0));
  };
  const bool one_head = t.row_begin / t.seq.seq_q == (t.row_end - 1) / t.seq.seq_q;
  const int64_t first = one_head ? t.row_begin % t.seq.seq_q : 0;
  const int64_t last = one_head ? (t.row_end - 1) % t.seq.seq_q : t.seq.seq_q - 1;
  return rows * (seen(first) + seen((first + last) / 2) + seen(last)) / 3;
}

template <typename Task>
void longest_first(const AttnParams& p, std::vector<Task>& tasks) {
  std::vector<std::pair<double, int64_t>> order(tasks.size());
  for (size_t i = 0; i < tasks.size(); ++i) order[i] = {-visible_pairs(p, tasks[i]), int64_t(i)};
  std::sort(order.begin(), order.end());
  std::vector<Task> sorted;
  sorted.reserve(tasks.size());
  for (const auto& [cost, i] : order) sorted.push_back(tasks[i]);
  tasks.swap(sorted);
}

}  // namespace

void attn_fwd(const AttnParams& p) {
  const Kernels& kernels = kernels_for(p.dtype);
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<Sequence> sequences = sequences_of(p);
  const int64_t group = p.heads_kv ? p.heads_q / p.heads_kv : 0;
  const int64_t units = p.batch * p.heads_kv;
  if (units == 0 || group == 0 || p.seq_q == 0) return;

  // Rows a task: many, for the packing; few enough to occupy the threads several times over.
  const bool few_rows = group * p.seq_q <= kernels.few_rows;
  int64_t task_rows = few_rows ? kernels.few_rows : std::min(kTaskRows, group * p.seq_q);
  if (!few_rows)
    task_rows = ceil_div(ceil_div(group * p.seq_q, ceil_div(group * p.seq_q, kTaskRows)),
                         kernels.fwd_rows) *
                kernels.fwd_rows;
  while (!few_rows && task_rows > kMinTaskRows &&
         units * ceil_div(group * p.seq_q, task_rows) < 4 * threads)
    task_rows =
        std::max(kMinTaskRows, ceil_div(task_rows / 2, kMinTaskRows / 2) * (kMinTaskRows / 2));
  // If that does not, the keys are split too.
  const int64_t row_tasks = units * ceil_div(group * p.seq_q, task_rows);
  const int64_t wanted_parts =
      threads > 1 && row_tasks < 2 * threads ? ceil_div(4 * threads, row_tasks) : 1;

  std::vector<FwdTask> tasks, combines;
  std::vector<int64_t> part_counts;
  int64_t parts = 0;
  double work = 0;
  for (const Sequence& seq : sequences) {
    const int64_t part_keys = std::max(kMinPartKeys, ceil_div(seq.seq_kv, wanted_parts));
    const int64_t part_count = wanted_parts > 1 ? ceil_div(seq.seq_kv, part_keys) : 1;
    for (int64_t head_kv = 0; head_kv < p.heads_kv; ++head_kv)
      for (int64_t row = 0; row < group * seq.seq_q; row += task_rows) {
        FwdTask task{
            {seq, head_kv, row, std::min(row + task_rows, group * seq.seq_q), 0, seq.seq_kv}, -1};
        work += visible_pairs(p, task) * (p.head_dim + p.head_dim_v);
        if (part_count <= 1) {
          tasks.push_back(task);
          continue;
        }
        task.part = parts;
        combines.push_back(task);
        part_counts.push_back(part_count);
        for (int64_t i = 0; i < part_count; ++i, ++parts) {
          task.part = parts;
          task.kv_begin = i * part_keys;
          task.kv_end = std::min(task.kv_begin + part_keys, seq.seq_kv);
          tasks.push_back(task);
        }
      }
  }
  if (p.window_left >= 0 || p.window_right >= 0 || p.cu_seqlens_q) longest_first(p, tasks);

  FwdParts workspace;
  std::unique_ptr<char[]> out, stats;
  if (parts) {
    const int64_t element = p.dtype == DType::f64 ? 8 : 4;
    workspace.rows = task_rows;
    out.reset(new char[parts * task_rows * p.head_dim_v * element]);
    stats.reset(new char[parts * task_rows * 2 * element]);
    workspace.out = out.get();
    workspace.stats = stats.get();
  }
  for_each_task(tasks.size(), work, [&](int64_t i, Scratch& scratch) {
    (few_rows ? kernels.fwd_few_rows : kernels.fwd)(p, tasks[i], workspace, scratch);
  });
  for_each_task(combines.size(), double(parts) * task_rows * p.head_dim_v,
                [&](int64_t i, Scratch& scratch) {
                  kernels.fwd_combine(p, combines[i], part_counts[i], workspace, scratch);
                });
}

namespace {

void mask_grad(const AttnBwdParams& p, const Kernels& kernels,
               const std::vector<Sequence>& sequences, double work) {
  // A task owns the elements it adds to; a dimension that the mask broadcasts is summed within the task.
  const auto step = [](bool owned, int64_t whole, int64_t part) {
    return owned ? std::min(part, whole) : whole;
  };
  const int64_t batches = step(p.dmask_batch_stride, p.batch, 1),
                heads = step(p.dmask_head_stride, p.heads_q, 1);
  const int64_t queries = step(p.dmask_q_stride, p.seq_q, kernels.bwd_rows);
  const int64_t keys = step(p.dmask_kv_stride && !p.dmask_q_stride, p.seq_kv, kernels.bwd_keys);
  std::vector<MaskGradTask> tasks;
  for (int64_t b = 0; b < p.batch; b += batches)
    for (int64_t h = 0; h < p.heads_q; h += heads)
      for (int64_t i = 0; i < p.seq_q; i += queries)
        for (int64_t j = 0; j < p.seq_kv; j += keys)
          tasks.push_back({b, std::min(b + batches, p.batch), h, std::min(h + heads, p.heads_q), i,
                           std::min(i + queries, p.seq_q), j, std::min(j + keys, p.seq_kv)});
  for_each_task(tasks.size(), work, [&](int64_t i, Scratch& scratch) {
    kernels.bwd_mask(p, sequences.data(), tasks[i], scratch);
  });
}

}  // namespace

void attn_bwd(const AttnBwdParams& p) {
  const Kernels& kernels = kernels_for(p.dtype);
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<Sequence> sequences = sequences_of(p);
  const int64_t group = p.heads_kv ? p.heads_q / p.heads_kv : 0;
  const int64_t units = p.batch * p.heads_kv;

  // Either one pass of five products with a task for each KV head, or, where that leaves threads idle, a
  // pass for dk, dv and one for dq, seven products in tasks of any size. Nothing is added atomically.
  const bool one_pass =
      5.0 * ceil_div(std::max<int64_t>(units, 1), threads) <= 7.4 * units / double(threads);
  std::vector<BwdTask> tasks;
  double work = 0;
  for (const Sequence& seq : sequences) {
    const int64_t rows = group * seq.seq_q;
    for (int64_t head_kv = 0; head_kv < p.heads_kv; ++head_kv) {
      const Extent whole{seq, head_kv, 0, rows, 0, seq.seq_kv};
      work += 2.5 * visible_pairs(p, whole) * (p.head_dim + p.head_dim_v);
      if (one_pass) {
        tasks.push_back({whole, true, true});
        continue;
      }
      for (int64_t kv = 0; kv < seq.seq_kv; kv += kernels.bwd_keys)
        tasks.push_back({{seq, head_kv, 0, rows, kv, std::min(kv + kernels.bwd_keys, seq.seq_kv)},
                         false,
                         true});
      for (int64_t row = 0; row < rows; row += 2 * kernels.bwd_rows)
        tasks.push_back(
            {{seq, head_kv, row, std::min(row + 2 * kernels.bwd_rows, rows), 0, seq.seq_kv},
             true,
             false});
    }
  }
  if (!one_pass || p.cu_seqlens_q) longest_first(p, tasks);
  for_each_task(tasks.size(), work,
                [&](int64_t i, Scratch& scratch) { kernels.bwd(p, tasks[i], scratch); });
  if (p.dmask) mask_grad(p, kernels, sequences, work);
  if (p.dsinks)
    for_each_task(p.heads_q, work,
                  [&](int64_t h, Scratch&) { kernels.bwd_sink(p, sequences.data(), h); });
}

}  // namespace flash_ext::cpu
