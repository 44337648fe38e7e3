# flash_ext with ROCm's PyTorch, on a machine with an AMD GPU. From the root of the repository:
#   docker build -f docker/rocm.Dockerfile -t flash_ext-rocm .
#   docker run --rm --device /dev/kfd --device /dev/dri --group-add video flash_ext-rocm
# PYTORCH_ROCM_ARCH: only the GPU at hand builds fastest, for example --build-arg PYTORCH_ROCM_ARCH=gfx942.
ARG BASE=rocm/pytorch:latest
FROM ${BASE}
ARG PYTORCH_ROCM_ARCH
ARG MAX_JOBS
COPY . /flash_ext
WORKDIR /flash_ext
# The image's torch is used; where it has no ROCm kernels the build must fail, not fall back to the CPU.
RUN FLASH_EXT_DEVICE=rocm pip install --verbose --editable '.[test]'
# First what is installed, then the GPU's own tests, then all others.
CMD python -m flash_ext info && pytest tests/test_gpu.py && pytest tests
