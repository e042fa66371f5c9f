/* workspace.c - memory that a call needs only while it runs: one block is kept for the next call, so
 * that a decode step allocates nothing. Called with the GIL held; whoever comes while the block is
 * in use gets one of its own. */
#include "bind.h"

static mkvq_py_workspace kept;

mkvq_py_workspace mkvq_py_take_workspace(int64_t bytes)
{
    mkvq_py_workspace workspace = kept;
    kept = (mkvq_py_workspace){NULL, 0};
    if (workspace.bytes >= bytes)
        return workspace;
    PyMem_Free(workspace.memory);
    workspace.memory = PyMem_Malloc((size_t)bytes);
    workspace.bytes = workspace.memory ? bytes : 0;
    if (!workspace.memory)
        PyErr_NoMemory();
    return workspace;
}

void mkvq_py_give_workspace(mkvq_py_workspace workspace)
{
    if (workspace.bytes > kept.bytes) {
        PyMem_Free(kept.memory);
        kept = workspace;
    } else
        PyMem_Free(workspace.memory);
}
