/* SPDX-License-Identifier: MIT
 *
 * hot.h - what the classes of ipckit._hot share. Only hot*.c include Python.h; the cffi module does
 * not read this file.
 */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

/* Call the method of that name with the arguments of a vectorcall. */
PyObject *hot_leave_to(const char *name, PyObject *self, PyObject *const *args, Py_ssize_t count,
                       PyObject *names);

bool hot_add_class(PyObject *module, PyType_Spec *spec);

/* Each adds the classes of its room; false with an exception. */
bool hot_add_kernel(PyObject *module);
bool hot_add_ring(PyObject *module);
bool hot_add_sync(PyObject *module);
