// The emulated kernels for numpy arrays; bfloat16 as uint16. What csrc/attn/args.cpp does for tensors.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "kernels.h"

namespace py = pybind11;
using namespace flash_ext;
using Array = py::array;
using OptionalArray = std::optional<py::array>;

namespace {

DType dtype_of(const Array& a) {
  switch (a.dtype().char_()) {
    case '?': return DType::b8;
    case 'e': return DType::f16;
    case 'H': return DType::bf16;
    case 'f': return DType::f32;
    case 'd': return DType::f64;
    default: throw std::invalid_argument("an array of another dtype");
  }
}

void* data_of(const OptionalArray& a) { return a ? const_cast<void*>(a->data()) : nullptr; }
int64_t stride(const Array& a, int d) { return a.strides(d) / a.itemsize(); }

TensorView view(const Array& a) {  // [batch, heads, seq, head_dim] or [total, heads, head_dim]
  if (a.ndim() == 3) return {const_cast<void*>(a.data()), 0, stride(a, 1), stride(a, 0)};
  return {const_cast<void*>(a.data()), stride(a, 0), stride(a, 1), stride(a, 2)};
}

template <typename T>
void read(const py::dict& from, const char* name, T& to) {
  if (from.contains(name)) to = from[name].cast<T>();
}

void read_params(AttnParams& p, const Array& q, const Array& k, const Array& v, const Array& out,
                 const Array& lse, const py::dict& options) {
  p.q = view(q), p.k = view(k), p.v = view(v), p.o = view(out);
  p.dtype = dtype_of(q);
  p.heads_q = q.shape(1), p.heads_kv = k.shape(1);
  p.head_dim = q.shape(q.ndim() - 1), p.head_dim_v = v.shape(v.ndim() - 1);
  p.lse = const_cast<void*>(lse.data());
  p.lse_batch_stride = lse.ndim() == 3 ? stride(lse, 0) : 0;
  p.lse_head_stride = stride(lse, static_cast<int>(lse.ndim()) - 2);
  OptionalArray cu_seqlens_q, cu_seqlens_k, mask, alibi_slopes, sinks, rng_state;
  read(options, "cu_seqlens_q", cu_seqlens_q);
  read(options, "cu_seqlens_k", cu_seqlens_k);
  if (cu_seqlens_q) {
    p.batch = cu_seqlens_q->shape(0) - 1;
    read(options, "max_seqlen_q", p.seq_q);
    read(options, "max_seqlen_k", p.seq_kv);
    p.cu_seqlens_q = static_cast<const int32_t*>(data_of(cu_seqlens_q));
    p.cu_seqlens_k = static_cast<const int32_t*>(data_of(cu_seqlens_k));
  } else {
    p.batch = q.shape(0), p.seq_q = q.shape(2), p.seq_kv = k.shape(2);
  }
  read(options, "scale", p.scale);
  read(options, "softcap", p.softcap);
  read(options, "window_left", p.window_left);
  read(options, "window_right", p.window_right);
  read(options, "top_left", p.top_left);
  read(options, "dropout_threshold", p.dropout_threshold);
  read(options, "attn_mask", mask);
  read(options, "alibi_slopes", alibi_slopes);
  read(options, "sinks", sinks);
  read(options, "rng_state", rng_state);
  if (mask && mask->size() > 0) {
    const auto own = [&](int d) { return mask->shape(d) == 1 ? 0 : stride(*mask, d); };
    p.mask = {data_of(mask), dtype_of(*mask), own(0), own(1), own(2), own(3)};
  }
  p.alibi_slopes = data_of(alibi_slopes);
  p.alibi_batch_stride = alibi_slopes && alibi_slopes->ndim() == 2 ? p.heads_q : 0;
  p.sinks = data_of(sinks);
  p.rng_state = static_cast<const int64_t*>(data_of(rng_state));
}

// One family's kernels, or a changed copy of them.
struct Library {
  simt::Kernels kernels;

  explicit Library(const std::string& path) {
    void* handle =
        dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);  // lazy: some kernels may be left out
    if (!handle) throw std::runtime_error(dlerror());
    kernels = reinterpret_cast<decltype(&emulated_kernels)>(dlsym(handle, "emulated_kernels"))();
  }

  int attn_fwd(const Array& q, const Array& k, const Array& v, Array out, Array lse,
               int multiprocessors, const py::dict& options) const {
    AttnParams p;
    read_params(p, q, k, v, out, lse, options);
    return kernels.attn_fwd(p, multiprocessors);
  }

  void attn_bwd(const Array& q, const Array& k, const Array& v, const Array& out, const Array& lse,
                int multiprocessors, const py::dict& options, const py::dict& grads) const {
    AttnBwdParams p;
    read_params(p, q, k, v, out, lse, options);
    const auto grad = [&](const char* name) { return grads[name].cast<Array>(); };
    p.grad_o = view(grad("out"));
    p.dq = view(grad("q")), p.dk = view(grad("k")), p.dv = view(grad("v"));
    OptionalArray of_lse, of_mask, of_sinks;
    read(grads, "lse", of_lse);
    read(grads, "attn_mask", of_mask);
    read(grads, "sinks", of_sinks);
    p.grad_lse = data_of(of_lse), p.dmask = data_of(of_mask), p.dsinks = data_of(of_sinks);
    if (of_mask) {
      const auto own = [&](int d) { return of_mask->shape(d) == 1 ? 0 : stride(*of_mask, d); };
      p.dmask_batch_stride = own(0), p.dmask_head_stride = own(1);
      p.dmask_q_stride = own(2), p.dmask_kv_stride = own(3);
    }
    kernels.attn_bwd(p, multiprocessors, grads["deterministic"].cast<bool>());
  }
};

}  // namespace

PYBIND11_MODULE(binding, m) {
  py::class_<Library>(m, "Library")
      .def(py::init<std::string>())
      .def("set_order", [](const Library& self, uint64_t order) { self.kernels.set_order(order); })
      .def("attn_bwd", &Library::attn_bwd, "Fills the gradients of q, k, v, attn_mask and sinks.")
      .def("attn_fwd", &Library::attn_fwd, "Fills out and lse; returns the number of splits.");
}
