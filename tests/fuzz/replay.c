/* replay.c - runs a target on files, without libFuzzer, and prints how many. */
#include "fuzz.h"

int main(int count, char **names)
{
    for (int i = 1; i < count; i++) {
        FILE *file = fopen(names[i], "rb");
        MUST(file && fseek(file, 0, SEEK_END) == 0);
        const long size = ftell(file);
        uint8_t *data = malloc((size_t)size); /* of the exact size, as libFuzzer has it */
        rewind(file);
        MUST(size >= 0 && fread(data, 1, (size_t)size, file) == (size_t)size);
        fclose(file);
        LLVMFuzzerTestOneInput(data, (size_t)size);
        free(data);
    }
    printf("%d files\n", count - 1);
    return 0;
}
