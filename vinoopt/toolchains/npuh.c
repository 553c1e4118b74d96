/* Compiles a model for an Intel NPU with OpenVINO's C API and prints one line `@@{json}`.
 *
 *   npuh MODEL.xml [-o BLOB] [-g PROPERTY]... [KEY=VALUE]...
 *
 * The exit code is no verdict, since the compiler may end the process before or after its work; the line is.
 * Its Python twin, with the same command line and answer, is npu_worker.py.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <windows.h>

#include <openvino/c/openvino.h>

#define MAX_ITEMS 64

static void print_json_string(const char* text) {
    putchar('"');
    for (const unsigned char* c = (const unsigned char*)(text ? text : ""); *c; ++c) {
        if (*c == '"' || *c == '\\')
            printf("\\%c", *c);
        else if (*c < 0x20)
            printf("\\u%04x", *c);
        else
            putchar(*c);
    }
    putchar('"');
}

/* Ends at once: the compiler's threads may hang or crash while libraries are unloaded. */
static void leave(int code) {
    fflush(stdout);
    fflush(stderr);
    TerminateProcess(GetCurrentProcess(), code);
}

static void check(ov_status_e status, const char* stage) {
    if (status == OK)
        return;
    const char* message = ov_get_last_err_msg();
    printf("\n@@{\"ok\": false, \"stage\": \"%s\", \"status\": %d, \"message\": ", stage, (int)status);
    print_json_string(message && *message ? message : ov_get_error_info(status));
    printf("}\n");
    leave(1);
}

int main(int argc, char** argv) {
    const char* blob = NULL;
    const char* asked[MAX_ITEMS];
    ov_property_t properties[MAX_ITEMS];
    size_t n_asked = 0, n_properties = 0;
    if (argc < 2 || argc > MAX_ITEMS) {
        fprintf(stderr, "usage: npuh MODEL.xml [-o BLOB] [-g PROPERTY]... [KEY=VALUE]...\n");
        return 2;
    }
    for (int i = 2; i < argc; ++i) {
        char* equals = strchr(argv[i], '=');
        if (!strcmp(argv[i], "-o") && i + 1 < argc) {
            blob = argv[++i];
        } else if (!strcmp(argv[i], "-g") && i + 1 < argc) {
            asked[n_asked++] = argv[++i];
        } else if (equals) {
            *equals = 0;
            properties[n_properties].key = argv[i];
            properties[n_properties++].value = equals + 1;
        } else {
            fprintf(stderr, "npuh: cannot read argument %s\n", argv[i]);
            return 2;
        }
    }

    ov_version_t version;
    ov_core_t* core = NULL;
    ov_model_t* model = NULL;
    ov_compiled_model_t* compiled = NULL;
    check(ov_get_openvino_version(&version), "version");
    check(ov_core_create(&core), "core");
    check(ov_core_set_properties(core, "NPU", n_properties, properties), "properties");
    check(ov_core_read_model(core, argv[1], NULL, &model), "read");
    ULONGLONG started = GetTickCount64();
    check(ov_core_compile_model_props(core, model, "NPU", 0, NULL, &compiled), "compile");
    ULONGLONG ended = GetTickCount64();
    if (blob)
        check(ov_compiled_model_export_model(compiled, blob), "export");

    printf("\n@@{\"ok\": true, \"openvino\": ");
    print_json_string(version.buildNumber);
    printf(", \"compile_ms\": %llu, \"properties\": {", ended - started);
    for (size_t i = 0, n_printed = 0; i < n_asked; ++i) {
        char* value = NULL;
        if (ov_compiled_model_get_property(compiled, asked[i], &value) != OK)
            continue;
        printf("%s", n_printed++ ? ", " : "");
        print_json_string(asked[i]);
        printf(": ");
        print_json_string(value);
    }
    printf("}}\n");
    leave(0);
    return 0;
}
