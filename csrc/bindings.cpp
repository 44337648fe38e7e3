// The ops' schemas (docs/design.md, section 7) and the Python module flash_ext._C, whose import loads
// them. Implementations register themselves where they are: csrc/cpu/ops.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flash_ext, m) {
  m.def(
      "attn_fwd(Tensor q, Tensor k, Tensor v, float scale, int window_left=-1, int "
      "window_right=-1, "
      "bool top_left=False, bool out_bshd=False, float softcap=0.0, float dropout_p=0.0, "
      "Tensor? attn_mask=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? "
      "rng_state=None, "
      "bool deterministic=False, int kernels=0) -> (Tensor out, Tensor lse)");
  // attn_fwd without options and without lse, which nobody reads: few arguments are parsed sooner. Its
  // gradient is that of attn_fwd.
  m.def(
      "attn_plain(Tensor q, Tensor k, Tensor v, float scale, int window_left=-1, int "
      "window_right=-1, "
      "bool top_left=False, bool out_bshd=False) -> Tensor");
  m.def(
      "attn_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, "
      "float scale, int window_left, int window_right, bool top_left, float softcap, float "
      "dropout_p, "
      "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, bool "
      "need_mask_grad, "
      "bool deterministic, int kernels=0) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, "
      "Tensor dsinks)");
  // attn_bwd without options.
  m.def(
      "attn_plain_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float "
      "scale, int window_left, int window_right, bool top_left, bool deterministic) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "attn_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, int window_left=-1, int "
      "window_right=-1, "
      "bool top_left=False, float softcap=0.0, float dropout_p=0.0, Tensor? attn_mask=None, "
      "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? rng_state=None, bool "
      "deterministic=False, int kernels=0) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "attn_varlen_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor "
      "out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float "
      "scale, "
      "int window_left, int window_right, bool top_left, float softcap, float dropout_p, Tensor? "
      "attn_mask, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, bool need_mask_grad, bool "
      "deterministic, int kernels=0) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)");
}

#ifndef FLASH_EXT_NO_PYTHON  // C++ programs link the ops without Python
#include <Python.h>

#include <stdexcept>

#include "cpu/dispatch.h"

#if __has_include("flash_ext_build.h")
#include "flash_ext_build.h"  // setup.py writes it; CMake passes the same macros
#endif

namespace {

#ifndef FLASH_EXT_VERSION
#define FLASH_EXT_VERSION "unknown"
#endif
#ifndef FLASH_EXT_BUILD_TORCH
#define FLASH_EXT_BUILD_TORCH "unknown"
#endif
#ifndef FLASH_EXT_BUILD_DEVICE
#define FLASH_EXT_BUILD_DEVICE "cpu"
#endif
#ifndef FLASH_EXT_BUILD_ARCHS
#define FLASH_EXT_BUILD_ARCHS ""
#endif
#ifndef FLASH_EXT_BUILD_COMPILER
#define FLASH_EXT_BUILD_COMPILER __VERSION__
#endif
#ifndef FLASH_EXT_BUILD_MODE
#define FLASH_EXT_BUILD_MODE "unknown"
#endif

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:s}", "version", FLASH_EXT_VERSION, "torch",
                       FLASH_EXT_BUILD_TORCH, "device", FLASH_EXT_BUILD_DEVICE, "archs",
                       FLASH_EXT_BUILD_ARCHS, "compiler", FLASH_EXT_BUILD_COMPILER, "mode",
                       FLASH_EXT_BUILD_MODE);
}

// Runs f, turning what it throws into a ValueError.
template <typename Function>
PyObject* guarded(Function f) {
  try {
    return f();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* cpu_isas(PyObject*, PyObject*) {
  const auto names = flash_ext::cpu::usable_isas();
  PyObject* list = PyList_New(Py_ssize_t(names.size()));
  for (size_t i = 0; list && i < names.size(); ++i)
    PyList_SetItem(list, Py_ssize_t(i), PyUnicode_FromString(names[i].c_str()));
  return list;
}

PyObject* cpu_isa(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(flash_ext::cpu::current_isa().c_str()); });
}

PyObject* set_cpu_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  return guarded([&] {
    flash_ext::cpu::set_isa(name);
    Py_INCREF(Py_None);
    return Py_None;
  });
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "What this module was built from and for: dict of str."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "The instruction sets usable on this machine, best first."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set that the CPU backend uses."},
    {"set_cpu_isa", set_cpu_isa, METH_VARARGS, "set_cpu_isa(name): use another one of cpu_isas()."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif  // FLASH_EXT_NO_PYTHON
