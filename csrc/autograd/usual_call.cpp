// flash_ext.attn's usual call with autograd's node in C++: docs/design.md, section 12. This file alone is
// compiled against the whole of torch, into a library of its own, which only the torch that it was
// built for may load (flash_ext/usual.py).
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// What the op of a call is told of it besides its tensors.
struct Call {
  double scale;
  int64_t window_left, window_right;
  bool top_left;
  bool deterministic;
  bool bshd;  // q, k, v, out and their gradients are [batch, seq, heads, head_dim]
};

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// For what autograd, autocast and views of views have no part in.
struct Below {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

Tensor heads_first(const Tensor& x, bool bshd) { return bshd ? x.transpose(1, 2) : x; }

Tensor attn_plain(const Tensor& q, const Tensor& k, const Tensor& v, const Call& call,
                  bool out_bshd) {
  using Op =
      Tensor(const Tensor&, const Tensor&, const Tensor&, double, int64_t, int64_t, bool, bool);
  static const auto plain = op<Op>("flash_ext::attn_plain");
  return plain.call(q, k, v, call.scale, call.window_left, call.window_right, call.top_left,
                    out_bshd);
}

std::tuple<Tensor, Tensor> attn_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Call& call, bool out_bshd) {
  using Op = std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, double, int64_t, int64_t, bool, bool, double,
      double, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, bool, int64_t);
  static const auto fwd = op<Op>("flash_ext::attn_fwd");
  const OptionalTensor none;
  return fwd.call(q, k, v, call.scale, call.window_left, call.window_right, call.top_left, out_bshd,
                  0.0, 0.0, none, none, none, none, false, 0);
}

// The gradients of q, k and v, all as the caller has his tensors.
variable_list gradients(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& out, const Tensor& lse, const Call& call) {
  using Op = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                const Tensor&, const Tensor&, const Tensor&, double,
                                                int64_t, int64_t, bool, bool);
  static const auto bwd = op<Op>("flash_ext::attn_plain_bwd");
  const auto in = [&](const Tensor& x) { return heads_first(x, call.bshd); };
  auto [dq, dk, dv] =
      bwd.call(in(grad_out), in(q), in(k), in(v), in(out), lse, call.scale, call.window_left,
               call.window_right, call.top_left, call.deterministic);
  if (!call.bshd) return {std::move(dq), std::move(dk), std::move(dv)};
  return {in(dq), in(dk), in(dv)};
}

bool functorch_is_active() {
  constexpr c10::DispatchKeySet keys({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                      c10::DispatchKey::FuncTorchDynamicLayerBackMode});
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(keys);
}

bool has_tangent(const Tensor& x) { return torch::autograd::isFwGradDefined(x); }

struct AttnPlainBackward : torch::autograd::Node {
  SavedVariable q, k, v, out, lse;
  Call call;

  std::string name() const override { return "AttnPlainBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor q = this->q.unpack(), k = this->k.unpack(), v = this->v.unpack();
    const Tensor out = this->out.unpack(getptr()), lse = this->lse.unpack();
    Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(out);
    // Where gradients are to be differentiated, autograd's kernel of the op says that they cannot.
    std::optional<Below> below;
    if (!at::GradMode::is_enabled() && !functorch_is_active() && !has_tangent(grad_out) &&
        !has_tangent(q) && !has_tangent(k) && !has_tangent(v))
      below.emplace();
    variable_list found = gradients(grad_out, q, k, v, out, lse, call);
    for (size_t i = 0; i < found.size(); ++i)
      if (!task_should_compute_output(i)) found[i].reset();
    return found;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&q, &k, &v, &out, &lse}) saved->reset_data();
  }

  // Compiled autograd: the gradients become a call in its graph, of a function without state.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable* saved : {&q, &k, &v}) args.collect(*saved, false);
    args.collect(out, true);
    args.collect(lse, false);
    args.collect(call.scale);
    args.collect(call.window_left);
    args.collect(call.window_right);
    args.collect(call.top_left);
    args.collect(call.deterministic);
    args.collect(call.bshd);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* saved : {&q, &k, &v, &out, &lse}) swap.before(*saved);
    PackedArgs packed;
    for (SavedVariable* saved : {&q, &k, &v}) packed.pack(saved->unpack());
    packed.pack(out.unpack(getptr()));
    packed.pack(lse.unpack());
    packed.pack(call.scale);
    packed.pack(call.window_left);
    packed.pack(call.window_right);
    packed.pack(call.top_left);
    packed.pack(call.deterministic);
    packed.pack(call.bshd);
    const auto args = std::move(packed).vec();
    std::vector<at::TypePtr> types;
    for (const c10::IValue& arg : args)
      types.push_back(arg.isTensor() ? at::TypePtr(at::TensorType::get()) : arg.type());
    const auto outputs =
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            get_input_metadata(next_edges()));
    const auto& compiler = getPyCompilerInterface();
    const std::string bound = compiler->bind_function(swap.get_py_compiler(), name(), from_packed,
                                                      types, /*is_custom_function=*/true);
    auto found = compiler->call_function(swap.get_py_compiler(), "apply_functional", bound, grads,
                                         args, outputs);
    for (SavedVariable* saved : {&q, &k, &v, &out, &lse}) swap.after(*saved);
    return found;
  }

  static variable_list from_packed(const variable_list& grads,
                                   const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    Tensor x[5];
    for (Tensor& tensor : x) tensor = packed.unpack<Tensor>();
    Call call;
    call.scale = packed.unpack<double>();
    call.window_left = packed.unpack<int64_t>();
    call.window_right = packed.unpack<int64_t>();
    call.top_left = packed.unpack<bool>();
    call.deterministic = packed.unpack<bool>();
    call.bshd = packed.unpack<bool>();
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(x[3]);
    return gradients(grad_out, x[0], x[1], x[2], x[3], x[4], call);
  }
};

// Older versions of torch hold nodes in a shared_ptr.
template <typename T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>) return c10::make_intrusive<T>();
  else return std::shared_ptr<T>(new T, [](auto* node) { deleteNode(node); });
}

// As autocast has them; what it changes is autograd's matter, too.
Tensor as_autocast_has(const Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype || !x.is_floating_point() || x.scalar_type() == at::kDouble
             ? x
             : x.to(dtype);
}

Tensor differentiable(const Tensor& q, const Tensor& k, const Tensor& v, const Call& call,
                      bool out_bshd) {
  const auto node = make_node<AttnPlainBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(q, k, v));
  Tensor out, lse;
  {
    const Below below;
    std::tie(out, lse) = attn_fwd(heads_first(q, call.bshd), heads_first(k, call.bshd),
                                  heads_first(v, call.bshd), call, out_bshd);
    out = heads_first(out, call.bshd);
  }
  torch::autograd::set_history(out, node);
  node->call = call;
  node->q = SavedVariable(q, false);
  node->k = SavedVariable(k, false);
  node->v = SavedVariable(v, false);
  node->out = SavedVariable(out, true);
  node->lse = SavedVariable(lse, false);
  return out;
}

// As in flash_ext/arguments.py.
bool lies_by_token(const Tensor& x) { return !x.is_contiguous() && x.stride(1) < x.stride(2); }

// Nothing where the long way is needed.
OptionalTensor attn_usual(Tensor q, Tensor k, Tensor v, std::optional<double> scale,
                          int64_t window_left, int64_t window_right, bool top_left, bool bshd,
                          std::optional<bool> deterministic) {
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || has_tangent(q) || has_tangent(k) ||
      has_tangent(v))
    return std::nullopt;
  const at::DeviceType device = q.device().type();
  if (at::autocast::is_autocast_enabled(device)) {
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
    q = as_autocast_has(q, dtype), k = as_autocast_has(k, dtype), v = as_autocast_has(v, dtype);
  }
  const int64_t head_dim = q.size(3);
  // As in flash_ext/arguments.py, whose ** is pow.
  const Call call{scale.value_or(head_dim ? std::pow(static_cast<double>(head_dim), -0.5) : 1.0),
                  window_left,
                  window_right,
                  top_left,
                  false,
                  bshd};
  const bool out_bshd = bshd || lies_by_token(q) || lies_by_token(v);
  if (torch::autograd::compute_requires_grad(q, k, v)) {
    Call with_gradients = call;
    with_gradients.deterministic =
        deterministic.value_or(at::globalContext().deterministicAlgorithms());
    return differentiable(q, k, v, with_gradients, out_bshd);
  }
  const Below below;
  return heads_first(
      attn_plain(heads_first(q, bshd), heads_first(k, bshd), heads_first(v, bshd), call, out_bshd),
      bshd);
}

TORCH_LIBRARY_FRAGMENT(flash_ext, m) {
  m.def(
      "attn_usual(Tensor q, Tensor k, Tensor v, float? scale, int window_left, int window_right, "
      "bool "
      "top_left, bool bshd, bool? deterministic) -> Tensor?",
      attn_usual);
}

}  // namespace
