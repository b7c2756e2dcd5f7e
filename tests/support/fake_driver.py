"""What stands in for NVIDIA's driver: libcuda and libnvidia-ml in C, compiled where a test wants them."""

from __future__ import annotations

import subprocess
from pathlib import Path

# A driver with two cards of different kinds. It reads CUDA_VISIBLE_DEVICES as the real one does; NVML, as the real
# one, does not, and numbers by bus id.
FAKE_DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static const char *names[] = {"NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"};
static const char *buses[] = {"00000000:01:00.0", "00000000:C1:00.0", "00000000:C1:00.0"};
static const int major[] = {8, 9, 9}, minor[] = {9, 0, 0}, shared[] = {101376, 232448, 232448};
static const size_t totals[] = {25386352640u, 84929347584u, 10468982784u};
static int order[3] = {0, 1, 2}, count = 2, ready = 0;
int cuInit(unsigned flags) {
    const char *fault = getenv("FAKE_CUINIT"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (fault) return atoi(fault);
    if (visible) for (count = 0; *visible >= '0' && *visible <= '2'; visible += visible[1] ? 2 : 1)
        order[count++] = *visible - '0';
    ready = flags == 0;
    return count ? 0 : 100;
}
int cuGetErrorString(int code, const char **text) {
    *text = "system has unsupported display driver / cuda driver combination";
    return code == 803 ? 0 : 1;
}
int cuDeviceGetCount(int *n) { *n = count; return ready ? 0 : 3; }
int cuDeviceGet(int *device, int index) { *device = order[index] + 40; return 0; }
int cuDeviceGetName(char *name, int size, int d) { snprintf(name, size, "%s", names[d - 40]); return 0; }
int cuDeviceGetPCIBusId(char *bus, int size, int d) { snprintf(bus, size, "%s", buses[d - 40]); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int d) { *bytes = totals[d - 40]; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int d) {
    if (getenv("FAKE_ATTRIBUTE")) return atoi(getenv("FAKE_ATTRIBUTE"));
    switch (attribute) {
        case 75: *value = major[d - 40]; return 0;
        case 76: *value = minor[d - 40]; return 0;
        case 97: *value = shared[d - 40]; return 0;
    }
    return 1;
}
"""
FAKE_NVML = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct memory { unsigned long long total, free, used; };
int nvmlInitWithFlags(unsigned flags) { return getenv("FAKE_NVML") ? 9 : 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.159.03"); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **handle) {
    *handle = (void *)(strstr(bus, ":C1:") ? 0x2000000001L : 0x1000000001L);
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
    const char *used = getenv("FAKE_USED_MIB");
    memory->total = ((long)handle == 0x2000000001L ? 81559ULL : 24564ULL) << 20;
    memory->used = (used ? atoll(used) : 0) << 20;
    memory->free = memory->total - memory->used;
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    const char *busy = getenv("FAKE_BUSY");
    rates[0] = busy ? atoi(busy) : 0;
    rates[1] = 0;
    return 0;
}
struct process { unsigned pid; unsigned long long bytes; unsigned gpu, compute; };
/* FAKE_HOLDERS: "PID:MIB PID:MIB ..."; a negative MIB is one that the driver does not tell. */
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *rows) {
    const char *text = getenv("FAKE_HOLDERS");
    unsigned room = *count;
    long long mib;
    int pid, read;
    for (*count = 0; text && sscanf(text, "%d:%lld%n", &pid, &mib, &read) == 2; text += read, ++*count)
        if (*count < room)
            rows[*count] = (struct process){pid, mib < 0 ? ~0ULL : (unsigned long long)mib << 20, ~0u, ~0u};
    return *count > room ? 7 : 0; /* too little room: how much it takes */
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, struct process *rows) {
    *count = 0;
    return 0;
}
int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size) {
    if (pid != 4242) return 6;
    snprintf(name, size, "/opt/venv/bin/python3 -m vllm --api-key hf_secret");
    return 0;
}
"""


def build_driver(folder: Path) -> Path:
    """Compile both libraries into a folder, for LD_LIBRARY_PATH."""
    for name, source in (("libcuda.so.1", FAKE_DRIVER), ("libnvidia-ml.so.1", FAKE_NVML)):
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)
    return folder
