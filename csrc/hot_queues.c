/* SPDX-License-Identifier: MIT
 *
 * hot_queues.c - ipckit._hot.QueueEnds: put and get over the verbs of Ends.
 *
 * The codec is two functions, called without any lock: what is put is bytes before it meets the
 * ring, and what is got has left it.
 */
#include <errno.h>
#include <math.h>
#include <string.h>

#include "hot.h"

enum { SEND = IK_RING_SEND, RECV = IK_RING_RECV };

/* --- arguments ------------------------------------------------------------------------------- */

/* block=True, timeout=None from the position on, or by name. Seconds to wait, infinite: for ever.
 */
static bool read_blocking(const char *verb, PyObject *const *args, Py_ssize_t count,
                          Py_ssize_t position, PyObject *names, double *ret_seconds) {
    PyObject *given[2] = {Py_True, Py_None};
    for (Py_ssize_t i = position; i < count && i < position + 2; i++)
        given[i - position] = args[i];
    Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    bool known = count >= position && count <= position + 2;
    for (Py_ssize_t i = 0; known && i < named; i++) {
        PyObject *name = PyTuple_GET_ITEM(names, i);
        bool block = PyUnicode_CompareWithASCIIString(name, "block") == 0;
        known = (block || PyUnicode_CompareWithASCIIString(name, "timeout") == 0) &&
                count <= position + !block;
        given[!block] = args[count + i];
    }
    if (!known) {
        PyErr_Format(PyExc_TypeError,
                     "%s(%sblock=True, timeout=None) was called with other arguments", verb,
                     position ? "obj, " : "");
        return false;
    }
    if (!hot_seconds_left(given[1], "timeout", ret_seconds))
        return false;
    int block = PyObject_IsTrue(given[0]);
    if (block == 0)
        *ret_seconds = 0;
    return block >= 0;
}

/* --- putting --------------------------------------------------------------------------------- */

/* What is in every pickle of a connection of multiprocessing, and hardly in another. */
static const char SUSPECT[] = "multiprocessing.connection";

static bool is_suspect(PyObject *message) {
    return PyBytes_CheckExact(message) &&
           memmem(PyBytes_AS_STRING(message), (size_t)PyBytes_GET_SIZE(message), SUSPECT,
                  sizeof SUSPECT - 1);
}

/* The message of an object: the object itself where messages are bytes. */
static PyObject *encoded(PyObject *self, PyObject *object) {
    PyObject *dumps = hot_ring_queue(self)->dumps, *looked = NULL;
    if (!dumps)
        return Py_NewRef(object);
    PyObject *message = PyObject_CallFunctionObjArgs(dumps, object, NULL);
    if (message && is_suspect(message)) {
        looked = PyObject_CallMethod(self, "_refuse_connections", "O", object);
        if (!looked)
            Py_CLEAR(message);
        Py_XDECREF(looked);
    }
    return message;
}

/* The codec comes first: it may be long about it, and another thread close the queue meanwhile. */
static PyObject *put(PyObject *self, const char *verb, PyObject *object, double seconds) {
    Py_buffer data;
    PyObject *result = NULL, *message = encoded(self, object);
    if (message && hot_buffer(message, "obj", false, &data)) {
        uint64_t len = (uint64_t)data.len;
        if (hot_ring_begin(self, SEND, verb)) {
            int rc = hot_ring_send(self, data.buf, len, seconds);
            result = rc < 0 ? hot_ring_fail(self, rc, verb, len) : Py_NewRef(Py_None);
        }
        PyBuffer_Release(&data);
    }
    Py_XDECREF(message);
    return result;
}

static PyObject *queue_put(PyObject *self, PyObject *const *args, Py_ssize_t count,
                           PyObject *names) {
    double seconds;
    /* An object given by name comes first in no particular place: Python sorts that out. */
    if (count == 0)
        return hot_leave_to("_put", self, args, count, names);
    if (!read_blocking("put", args, count, 1, names, &seconds))
        return NULL;
    return put(self, "put", args[0], seconds);
}

static PyObject *queue_put_nowait(PyObject *self, PyObject *object) {
    return put(self, "put", object, 0);
}

/* --- getting --------------------------------------------------------------------------------- */

/* Messages that were received and not got, from index on, come before any other: what could not be
 * decoded, and what was behind it. */
static void set_rest(PyObject *self, PyObject *messages, Py_ssize_t index) {
    PyObject *kind, *value, *trace, **rest = &hot_ring_queue(self)->rest;
    if (index == PyList_GET_SIZE(messages))
        return;
    PyErr_Fetch(&kind, &value, &trace);
    PyObject *part = PyList_GetSlice(messages, index, PyList_GET_SIZE(messages));
    if (part && *rest) /* another thread's */
        PyList_SetSlice(part, PyList_GET_SIZE(part), PyList_GET_SIZE(part), *rest);
    if (part)
        Py_XSETREF(*rest, part);
    PyErr_Restore(kind, value, trace);
}

static PyObject *decoded(PyObject *self, PyObject *message) {
    PyObject *loads = hot_ring_queue(self)->loads;
    return loads ? PyObject_CallFunctionObjArgs(loads, message, NULL) : Py_NewRef(message);
}

/* Decode as many; those before the first that can't be. If that is the first of all, NULL with its
 * exception, and it is gone. It stays if a signal's handler raised, which is no fault of it. */
static PyObject *decode_row(PyObject *self, PyObject *messages, Py_ssize_t most) {
    PyObject *objects = PyList_New(0), *object = NULL;
    Py_ssize_t done = 0, count = PyList_GET_SIZE(messages);
    for (int rc = objects ? 0 : -1; rc == 0 && done < count && done < most; done += rc == 0) {
        object = decoded(self, PyList_GET_ITEM(messages, done));
        rc = object ? PyList_Append(objects, object) : -1;
        Py_XDECREF(object);
    }
    bool failed = PyErr_Occurred(), stays = failed && !PyErr_ExceptionMatches(PyExc_Exception);
    set_rest(self, messages, stays ? 0 : done + (failed && done == 0));
    if (stays || (failed && done == 0))
        Py_CLEAR(objects);
    else
        PyErr_Clear();
    return objects;
}

static PyObject *get_row(PyObject *self, const char *verb, Py_ssize_t most, double seconds) {
    PyObject *objects = NULL, *messages = hot_ring_queue(self)->rest;
    hot_ring_queue(self)->rest = NULL;
    if (!messages)
        messages = hot_ring_recv_row(self, verb, most, seconds);
    if (messages)
        objects = decode_row(self, messages, most);
    Py_XDECREF(messages);
    return objects;
}

/* The only one of a list. */
static PyObject *only(PyObject *list) {
    PyObject *object = list ? Py_NewRef(PyList_GET_ITEM(list, 0)) : NULL;
    Py_XDECREF(list);
    return object;
}

static PyObject *get(PyObject *self, double seconds) {
    int64_t rc = 0;
    if (!hot_ring_begin(self, RECV, "get"))
        return NULL;
    if (hot_ring_queue(self)->rest)
        return only(get_row(self, "get", 1, seconds));
    PyObject *message = hot_ring_recv(self, seconds, &rc);
    if (!message)
        return hot_ring_fail(self, rc, "get", 0);
    PyObject *object = decoded(self, message);
    if (!object && !PyErr_ExceptionMatches(PyExc_Exception)) {
        PyObject *list = Py_BuildValue("[O]", message);
        if (list)
            set_rest(self, list, 0);
        Py_XDECREF(list);
    }
    Py_DECREF(message);
    return object;
}

static PyObject *queue_get(PyObject *self, PyObject *const *args, Py_ssize_t count,
                           PyObject *names) {
    double seconds;
    return read_blocking("get", args, count, 0, names, &seconds) ? get(self, seconds) : NULL;
}

static PyObject *queue_get_nowait(PyObject *self, PyObject *none) {
    (void)none;
    return get(self, 0);
}

/* (most, block, timeout) */
static PyObject *queue_get_many(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    double seconds;
    Py_ssize_t most = count == 3 ? PyNumber_AsSsize_t(args[0], NULL) : 1;
    if (most == -1 && PyErr_Occurred())
        return NULL;
    if (!read_blocking("get_many", args, count, 1, NULL, &seconds))
        return NULL;
    return hot_ring_begin(self, RECV, "get_many") ? get_row(self, "get_many", most, seconds) : NULL;
}

/* --- the object ------------------------------------------------------------------------------ */

/* (dumps, loads): None for both where messages are bytes. */
static PyObject *queue_set_codec(PyObject *self, PyObject *args) {
    hot_queue *queue = hot_ring_queue(self);
    PyObject *dumps, *loads;
    if (!PyArg_ParseTuple(args, "OO", &dumps, &loads))
        return NULL;
    Py_XSETREF(queue->dumps, dumps == Py_None ? NULL : Py_NewRef(dumps));
    Py_XSETREF(queue->loads, loads == Py_None ? NULL : Py_NewRef(loads));
    Py_RETURN_NONE;
}

/* (table, doing, lacks): the table, where it shows what we do, 0 for nowhere, and the roles that
 * would have to be taken first. */
static PyObject *queue_set_place(PyObject *self, PyObject *args) {
    unsigned long long table, doing;
    unsigned int lacks;
    if (!PyArg_ParseTuple(args, "KKI", &table, &doing, &lacks))
        return NULL;
    hot_ring_queue(self)->table = (const ik_queue_table *)(uintptr_t)table;
    hot_ring_queue(self)->doing = (ik_queue_doing *)(uintptr_t)doing;
    hot_ring_queue(self)->lacks = lacks;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    put_doc,
    "put($self, obj, block=True, timeout=None)\n--\n\n"
    "Put an object; block while there is no room. It is in shared memory when this returns.\n\n"
    "Args: obj: what the codec takes. block: False as a timeout of 0. timeout: seconds; below\n"
    "    0 is 0.\n"
    "Raises: queue.Full, and then it was not put; ShutDown; what the codec raises, and the\n"
    "    queue is as before; OSError EMSGSIZE for more than max_message bytes; OSError\n"
    "    EDEADLK if this thread has reserved; OSError EUSERS if the table of who takes part\n"
    "    is full of the living; Corrupt; Closed.\n"
    "Fork: usable on both sides. Threads: any number.\n");

PyDoc_STRVAR(
    get_doc,
    "get($self, block=True, timeout=None)\n--\n\n"
    "Get the oldest object; block until there is one.\n\n"
    "A message that the codec can't decode is gone, and its exception raised.\n\n"
    "Args: block: False as a timeout of 0. timeout: seconds; below 0 is 0.\n"
    "Raises: queue.Empty; Ended, an Empty and an EOFError, if the last producer is gone and all\n"
    "    was received: at once without a timeout, else at its end; ShutDown; what the codec "
    "raises; OSError EMSGSIZE if the message is larger than\n"
    "    max_message: it stays; OSError EDEADLK if this thread peeks; EUSERS as put();\n"
    "    Corrupt; Closed.\n"
    "Fork: usable on both sides. Threads: any number.\n");

PyDoc_STRVAR(put_nowait_doc, "put_nowait($self, obj, /)\n--\n\nput(obj, block=False).\n");

PyDoc_STRVAR(get_nowait_doc, "get_nowait($self)\n--\n\nget(block=False).\n");

#define FAST(name, flags, doc) {#name, (PyCFunction)(void (*)(void))queue_##name, flags, doc}

static PyMethodDef methods[] = {
    FAST(put, METH_FASTCALL | METH_KEYWORDS, put_doc),
    FAST(get, METH_FASTCALL | METH_KEYWORDS, get_doc),
    FAST(put_nowait, METH_O, put_nowait_doc),
    FAST(get_nowait, METH_NOARGS, get_nowait_doc),
    {"_encode", encoded, METH_O, NULL},
    {"_get_many", (PyCFunction)(void (*)(void))queue_get_many, METH_FASTCALL, NULL},
    {"_set_codec", queue_set_codec, METH_VARARGS, NULL},
    {"_set_place", queue_set_place, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_methods, methods},
    {0},
};

static PyType_Spec spec = {
    .name = "ipckit._hot.QueueEnds",
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};

bool hot_add_queues(PyObject *module, PyObject *ends_class) {
    PyObject *class = PyType_FromModuleAndSpec(module, &spec, ends_class);
    bool added = class && PyModule_AddType(module, (PyTypeObject *)class) == 0;
    Py_XDECREF(class);
    return added;
}
