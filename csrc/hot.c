/* SPDX-License-Identifier: MIT
 *
 * hot.c - ipckit._hot: the calls of which a Python function around them would be a quarter of the
 * time. This file has what its classes share, and the module; hot_<room>.c the classes of a room,
 * hot_arguments.c what they make of their arguments.
 */
#include "hot.h"

PyObject *hot_leave_to(const char *name, PyObject *self, PyObject *const *args, Py_ssize_t count,
                       PyObject *names) {
    if (PyErr_Occurred()) /* an argument was wrong */
        return NULL;
    PyObject *result = NULL, *method = PyObject_GetAttrString(self, name);
    PyObject *positional = PyTuple_New(count), *keywords = PyDict_New();
    bool ready = method && positional && keywords;
    for (Py_ssize_t i = 0; ready && i < count; i++)
        ready = PyTuple_SetItem(positional, i, Py_NewRef(args[i])) == 0;
    for (Py_ssize_t i = 0; ready && names && i < PyTuple_Size(names); i++)
        ready = PyDict_SetItem(keywords, PyTuple_GetItem(names, i), args[count + i]) == 0;
    if (ready)
        result = PyObject_Call(method, positional, keywords);
    Py_XDECREF(method);
    Py_XDECREF(positional);
    Py_XDECREF(keywords);
    return result;
}

bool hot_add_class(PyObject *module, PyType_Spec *spec) {
    PyObject *class = PyType_FromModuleAndSpec(module, spec, NULL);
    bool added = class && PyModule_AddType(module, (PyTypeObject *)class) == 0;
    Py_XDECREF(class);
    return added;
}

static int fill(PyObject *module) {
    bool added = hot_add_kernel(module) && hot_add_process(module) && hot_add_ring(module) &&
                 hot_add_sync(module);
    return added ? 0 : -1;
}

/* Not declared safe without the GIL. What is in shared memory is; missing is what threads of one
 * process share under the GIL only: an Ends' users, loans, and messages kept or pending; spin and
 * recovered of a handle of sync; the one buffer of each kind of kernel queue. */
static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, fill},
    {0},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "ipckit._hot", .m_size = 0,
                                        .m_methods = hot_arguments, .m_slots = slots};

PyMODINIT_FUNC PyInit__hot(void) {
    return PyModuleDef_Init(&definition);
}
