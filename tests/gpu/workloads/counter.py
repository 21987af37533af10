"""Counts on the GPU alone, with nothing but the driver's API: no PyTorch, one small context. The
kernel adds 1 to a number in device memory; each report reads it back.

python counter.py
"""

import ctypes
import json
import os
import time

KERNEL = b"""
.version 7.0
.target sm_50
.address_size 64
.visible .entry increment(.param .u64 place)
{
    .reg .u64 %address, %value;
    ld.param.u64 %address, [place];
    ld.global.u64 %value, [%address];
    add.u64 %value, %value, 1;
    st.global.u64 [%address], %value;
    ret;
}
"""

cuda = ctypes.CDLL("libcuda.so.1")


def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    assert code == 0, f"{name}: CUresult {code}"


context, module, kernel = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
number, place, ticks = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_uint64()
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(number), 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
call("cuCtxSetCurrent", context)
call("cuModuleLoadData", ctypes.byref(module), KERNEL)
call("cuModuleGetFunction", ctypes.byref(kernel), module, b"increment")
call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(8))
call("cuMemsetD8_v2", place, ctypes.c_ubyte(0), ctypes.c_size_t(8))
parameters = (ctypes.c_void_p * 1)(ctypes.addressof(place))
counter = 0
with open("/job/status", "a", buffering=1) as file:
    while True:
        counter += 1
        call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, None, parameters, None)
        call("cuMemcpyDtoH_v2", ctypes.byref(ticks), place, ctypes.c_size_t(8))
        line = {"counter": counter, "ticks": ticks.value, "pid": os.getpid(), "time": time.time()}
        file.write(json.dumps(line) + "\n")
        time.sleep(0.02)
