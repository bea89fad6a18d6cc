/* SPDX-License-Identifier: MIT
 *
 * hot.h - what the classes of ipckit._hot share. Only hot*.c include Python.h; the cffi module does
 * not read this file.
 */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "queues.h"

/* Call the method of that name with the arguments of a vectorcall; not with an exception set. */
PyObject *hot_leave_to(const char *name, PyObject *self, PyObject *const *args, Py_ssize_t count,
                       PyObject *names);

bool hot_add_class(PyObject *module, PyType_Spec *spec);

/* --- of hot_arguments.c: an argument of that name is what it should be, or false with an exception
 * that tells the name and the value --------------------------------------------------------------
 */

/* What has __index__ and is no bool. TypeError; ValueError out of the range. */
bool hot_integer(PyObject *value, const char *name, int64_t least, int64_t most,
                 int64_t *ret_number);

/* What has __float__ or __index__; None and all from a century on: infinite. TypeError; ValueError
 * for nan and below 0. */
bool hot_seconds(PyObject *value, const char *name, double *ret_seconds);

/* The same where a class of multiprocessing is stood in for: below 0 is 0. */
bool hot_seconds_left(PyObject *value, const char *name, double *ret_seconds);

/* The deadline after so many seconds of these two; infinite: IK_FOREVER. The clock is read only by
 * who waits. */
int64_t hot_deadline(double seconds);

/* Bytes as they lie in memory, to be given to PyBuffer_Release(). TypeError for what is no buffer,
 * holds references to Python objects, or is read-only and should not be; BufferError for gaps. */
bool hot_buffer(PyObject *object, const char *name, bool writable, Py_buffer *ret_view);

extern PyMethodDef hot_arguments[];

/* --- the classes -------------------------------------------------------------------------------
 */

/* Each adds the classes or functions of its room; false with an exception. */
bool hot_add_kernel(PyObject *module);
bool hot_add_process(PyObject *module);
bool hot_add_ring(PyObject *module);
bool hot_add_sync(PyObject *module);
bool hot_add_queues(PyObject *module, PyObject *ends_class);

/* --- of hot_ring.c, for the classes built on Ends ----------------------------------------------
 */

/* What an Ends has that is a queue's. */
typedef struct {
    PyObject *dumps, *loads;     /* NULL: messages are bytes */
    PyObject *rest;              /* list of messages that come before those in the ring, or NULL */
    ik_queue_doing *doing;       /* ours in the table of who takes part; NULL: we are not in it */
    uint32_t lacks;              /* roles that we are not in it with yet; 0 for what is no queue */
    uint32_t slices;             /* of waiting, counted */
    const ik_queue_table *table; /* that one; NULL for what is no queue */
} hot_queue;

hot_queue *hot_ring_queue(PyObject *self);

/* For put and get, before all: not closed, and in the table with the role; else an exception. */
bool hot_ring_begin(PyObject *self, int side, const char *verb);

/* 0, or -errno as ik_ring_send(), for hot_ring_fail(). */
int hot_ring_send(PyObject *self, const void *data, uint64_t len, double seconds);

/* The message, or NULL with -errno. What has a timeout waits to its end, as the standard library's
 * queues do, also where nothing can come any more. */
PyObject *hot_ring_recv(PyObject *self, double seconds, int64_t *ret_error);

/* So too. Those that are there, at least one; NULL with an exception. */
PyObject *hot_ring_recv_row(PyObject *self, const char *verb, Py_ssize_t most, double seconds);

/* Raise. Always NULL. */
PyObject *hot_ring_fail(PyObject *self, int64_t rc, const char *verb, uint64_t size);
