// What launchers ask of a GPU.
#pragma once

namespace flash_ext {

struct GpuFacts {
  int multiprocessors, warp_size, smem_per_block, l2_bytes;
  bool adds_async;  // see tile/atomic.h
  bool hopper;      // of compute capability 9.0
};
GpuFacts gpu_facts(int device);

// Makes a device current for this library's runtime while it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;

 private:
  int previous;
};

}  // namespace flash_ext
