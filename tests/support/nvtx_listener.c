/* Stands in for Nsight: NVTX loads it (NVTX_INJECTION64_PATH) and it prints every range of a domain on stderr. */
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <string.h>

static nvtxDomainHandle_t create(const char* name) { return (nvtxDomainHandle_t)strdup(name); }

static nvtxStringHandle_t keep(nvtxDomainHandle_t domain, const char* text) {
    (void)domain;
    return (nvtxStringHandle_t)strdup(text);
}

static int push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* range) {
    const int is_kept = range->messageType == NVTX_MESSAGE_TYPE_REGISTERED;
    const char* text = is_kept ? (const char*)range->message.registered : range->message.ascii;
    return fprintf(stderr, "push %s:%s\n", (const char*)domain, text);
}

static int pop(nvtxDomainHandle_t domain) { return fprintf(stderr, "pop %s\n", (const char*)domain); }

__attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
    const NvtxExportTableCallbacks* callbacks = get_table(NVTX_ETID_CALLBACKS);
    NvtxFunctionTable functions;
    unsigned int size = 0;
    if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &functions, &size)) return 0;
    *functions[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)&create;
    *functions[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)&keep;
    *functions[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)&push;
    *functions[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)&pop;
    return 1;
}
