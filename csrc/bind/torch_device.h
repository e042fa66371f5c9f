// torch_device.h - on which device the tensors of a call lie, and calling the core there.
//
// The kernels of mixkvq._cuda are found through its table, which mixkvq.torch_module hands over: so
// this file needs neither CUDA nor libtorch_cuda.
#ifndef MKVQ_TORCH_DEVICE_H
#define MKVQ_TORCH_DEVICE_H
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda/mixkvq_cuda.h"

// Of libtorch_cpu from torch 2.13 on; null on older ones.
extern "C" __attribute__((weak)) AOTITorchError
torch_stream_native_handle(StreamHandle stream, void **ret_native_handle);

namespace
{
using torch::stable::Tensor;

const mkvq_api *api = nullptr; // set when the module is imported

// ---- what mixkvq.torch_module found -------------------------------------------------------------
struct {
    const mkvq_cuda_api *table;
    AOTITorchError (*current_stream)(int32_t, void **); // of libtorch_cuda, for torch before 2.13
    bool on_host; // the table's functions run on the host (csrc/cuda/emulate.h): for tests
} cuda;

// ---- errors -------------------------------------------------------------------------------------
inline void check(mkvq_status status, const mkvq_error &error)
{
    if (status == MKVQ_OK)
        return;
    STD_TORCH_CHECK(error.argument, api->status_text(status));
    STD_TORCH_CHECK(status != MKVQ_E_DEVICE, error.argument, " ", error.value, ": ", error.allowed);
    STD_TORCH_CHECK(false, error.argument, " is ", error.value, ", must be ", error.allowed, " (",
                    api->status_text(status), ")");
}

// ---- the device of a call -----------------------------------------------------------------------
class Where
{
  public:
    explicit Where(const Tensor &t, const char *name) : gpu(t.is_cuda())
    {
        STD_TORCH_CHECK(gpu || t.is_cpu(), name, " must be on the CPU or on a CUDA device");
        if (!gpu)
            return;
        STD_TORCH_CHECK(cuda.table && !cuda.on_host, name,
                        " is on a CUDA device, and this build of mixkvq has no CUDA kernels "
                        "(mixkvq.torch_module.CUDA_PROBLEM says why)");
        index = t.get_device_index();
        guard.emplace(index);
    }

    void expect(const Tensor &t, const char *name) const
    {
        const bool here = gpu ? t.is_cuda() && t.get_device_index() == index : t.is_cpu();
        STD_TORCH_CHECK(here, name,
                        gpu ? " must be on the same CUDA device as the others"
                            : " must be on the CPU as the others");
    }

    // Whether the functions of the CUDA table serve the call.
    bool by_kernels() const
    {
        return gpu || cuda.on_host;
    }

    template <typename Args>
    void call(mkvq_status (*core)(const Args *, mkvq_error *),
              mkvq_status (*mkvq_cuda_api::*kernels)(const Args *, void *, mkvq_error *),
              const Args &args) const
    {
        mkvq_error error{};
        check(by_kernels() ? (cuda.table->*kernels)(&args, stream(), &error) : core(&args, &error),
              error);
    }

  private:
    bool gpu;
    int32_t index = 0;
    std::optional<torch::stable::accelerator::DeviceGuard> guard;

    // The current stream of the device, as CUDA has it.
    void *stream() const
    {
        void *native = nullptr;
        if (!gpu)
            return native;
        AOTITorchError failed = 1;
        if (torch_stream_native_handle) {
            StreamHandle handle = nullptr;
            failed = aoti_torch_get_current_stream(index, &handle);
            if (!failed) {
                failed = torch_stream_native_handle(handle, &native);
                aoti_torch_delete_stream(handle);
            }
        } else if (cuda.current_stream)
            failed = cuda.current_stream(index, &native);
        STD_TORCH_CHECK(!failed, "torch does not tell the current stream of CUDA device ", index);
        return native;
    }
};
} // namespace
#endif
