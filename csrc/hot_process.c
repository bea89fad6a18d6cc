/* SPDX-License-Identifier: MIT
 *
 * hot_process.c - fork(2) of a Python process: one call, after which the parent has the pidfd of
 * the child and the child is ready to become what it shall be.
 */
#include <errno.h>
#include <unistd.h>

#include "hot.h"
#include "process.h"

/* As os.fork(), between the hooks of os.register_at_fork(); but a process with threads is not
 * warned of. CPython gives its warning in the parent when the child is there (only then it knows
 * which threads the hooks have left), and from 3.15 on lets it raise: where warnings are errors the
 * pid would be lost. Given before the fork it would refuse forks of processes whose hooks end their
 * threads. So the reference tells it, and nothing is left that can raise once there is a child. */
static int fork_between_hooks(int flags) {
    PyOS_BeforeFork();
    int pid = fork();
    if (pid == 0) {
        PyOS_AfterFork_Child();
        ik_process_begin_child(flags);
        return 0;
    }
    int error = errno;
    PyOS_AfterFork_Parent();
    return pid < 0 ? -error : pid;
}

PyDoc_STRVAR(fork_doc,
             "_fork($module, flags, pidfd, /)\n--\n\n"
             "Fork, with signals blocked in the child until _unblock().\n\n"
             "Args: flags: of ik_process_flags. pidfd: the address of an int, which is set\n"
             "    before any handler of a signal runs: so the child can't be lost.\n"
             "Returns: the pid, 0 in the child, or -errno.\n");

static PyObject *fork_python(PyObject *Py_UNUSED(module), PyObject *arguments) {
    int flags;
    unsigned long long pidfd;
    if (!PyArg_ParseTuple(arguments, "iK", &flags, &pidfd) || PySys_Audit("os.fork", NULL) < 0)
        return NULL;
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_RuntimeError, "fork: only the main interpreter can go on in a child");
        return NULL;
    }
    int rc = ik_process_before_fork();
    if (rc < 0)
        return PyLong_FromLong(rc);
    /* Handlers of what came before the block run now, while their exceptions leave no child. */
    if (PyErr_CheckSignals() < 0) {
        ik_process_after_fork(-EINTR);
        return NULL;
    }
    int pid = fork_between_hooks(flags);
    if (pid == 0)
        return PyLong_FromLong(0);
    rc = ik_process_after_fork(pid);
    if (rc < 0)
        return PyLong_FromLong(rc);
    *(int *)(uintptr_t)pidfd = rc;
    return PyLong_FromLong(pid);
}

PyDoc_STRVAR(unblock_doc, "_unblock($module)\n--\n\n"
                          "In the child of _fork(): the signal mask that the parent had.\n");

static PyObject *unblock(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored)) {
    ik_process_unblock();
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"_fork", fork_python, METH_VARARGS, fork_doc},
    {"_unblock", unblock, METH_NOARGS, unblock_doc},
    {0},
};

bool hot_add_process(PyObject *module) {
    return PyModule_AddFunctions(module, functions) == 0;
}
