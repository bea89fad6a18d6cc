/* SPDX-License-Identifier: MIT
 *
 * hot_kernel.c - the classes of ipckit._hot for the kernel's message queues.
 *
 * Their methods do what succeeds at once, those of POSIX queues also what succeeds after a wait;
 * anything else (errors, other buffers than bytes) they leave to the Python method of the same name
 * with an underscore in front, which gets the same arguments; when the time is over, with a timeout
 * of 0.
 */
#include <errno.h>
#include <math.h>
#include <poll.h>
#include <string.h>
#include <sys/msg.h>

#include "hot.h"
#include "posix.h"
#include "wait.h"

/* So little that the GIL isn't worth dropping for it, which also guards the buffer. */
enum { AT_ONCE = 16384, IN_A_ROW = 256 }; /* bytes; messages */

/* --- arguments ------------------------------------------------------------------------------- */

typedef struct {
    long number;    /* the priority or type */
    double seconds; /* infinite: no timeout */
} options;

/* The keywords are only timeout and the one of the number, which is a plain one. If not, an
 * exception may be set, and hot_leave_to() sees to the rest. */
static bool are_plain(PyObject *const *values, PyObject *names, const char *number_name,
                      long number, options *ret_options) {
    *ret_options = (options){number, INFINITY};
    for (Py_ssize_t i = 0; names && i < PyTuple_Size(names); i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        if (PyUnicode_CompareWithASCIIString(name, "timeout") == 0) {
            if (!hot_seconds(values[i], "timeout", &ret_options->seconds))
                return false;
        } else if (number_name && PyUnicode_CompareWithASCIIString(name, number_name) == 0 &&
                   PyLong_CheckExact(values[i])) {
            int overflow;
            ret_options->number = PyLong_AsLongAndOverflow(values[i], &overflow);
            if (overflow)
                return false;
        } else {
            return false;
        }
    }
    return true;
}

/* As hot_leave_to(), with another first argument. */
static PyObject *leave_with(const char *name, PyObject *self, PyObject *first,
                            PyObject *const *values, PyObject *names) {
    PyObject *args[3] = {first};
    for (Py_ssize_t i = 0; names && i < PyTuple_Size(names) && i < 2; i++)
        args[i + 1] = values[i];
    return hot_leave_to(name, self, args, 1, names);
}

/* --- POSIX queues ---------------------------------------------------------------------------- */

static ik_posix_message *received;

typedef struct {
    PyObject_HEAD ik_posix_queue queue;
} queue_object;

static ik_posix_queue *queue_of(PyObject *self) {
    return &((queue_object *)self)->queue;
}

/* args has room for two more. */
static PyObject *fail_at_once(const char *name, PyObject *self, PyObject **args, Py_ssize_t count,
                              const options *given) {
    PyObject *names =
        count ? Py_BuildValue("(ss)", "timeout", "priority") : Py_BuildValue("(s)", "timeout");
    PyObject *zero = PyLong_FromLong(0), *priority = PyLong_FromLong(given->number);
    args[count] = zero;
    args[count + 1] = priority;
    PyObject *result =
        names && zero && priority ? hot_leave_to(name, self, args, count, names) : NULL;
    Py_XDECREF(names);
    Py_XDECREF(zero);
    Py_XDECREF(priority);
    return result;
}

/* Wait first: it was found full just now. -EINTR: a handler raised. Bytes are never changed, so
 * nobody needs the GIL for them. */
static int send_waiting(ik_posix_queue *queue, PyObject *message, long priority,
                        int64_t deadline_ns) {
    size_t len = (size_t)PyBytes_Size(message);
    const char *data = PyBytes_AsString(message);
    int rc;
    do {
        Py_BEGIN_ALLOW_THREADS;
        rc = deadline_ns == IK_NOW ? 0 : ik_posix_queue_wait(queue, POLLOUT, deadline_ns);
        if (rc == 0)
            rc = ik_posix_queue_send(queue, data, len, priority, deadline_ns);
        Py_END_ALLOW_THREADS;
    } while (rc == -EINTR && PyErr_CheckSignals() == 0);
    return rc;
}

static int send_at_once(ik_posix_queue *queue, PyObject *message, long priority) {
    size_t len = (size_t)PyBytes_Size(message);
    return len > AT_ONCE
               ? -ETIMEDOUT
               : ik_posix_queue_send(queue, PyBytes_AsString(message), len, priority, IK_NOW);
}

static PyObject *queue_send(PyObject *self, PyObject *const *args, Py_ssize_t count,
                            PyObject *names) {
    options given;
    if (count != 1 || !PyBytes_CheckExact(args[0]) ||
        !are_plain(args + 1, names, "priority", 0, &given))
        return hot_leave_to("_send", self, args, count, names);
    int rc = send_at_once(queue_of(self), args[0], given.number);
    if (rc == -ETIMEDOUT && given.seconds > 0) {
        rc = send_waiting(queue_of(self), args[0], given.number, hot_deadline(given.seconds));
        if (rc == -EINTR)
            return NULL;
        if (rc == -ETIMEDOUT)
            return fail_at_once("_send", self, (PyObject *[3]){args[0]}, 1, &given);
    }
    return rc < 0 ? hot_leave_to("_send", self, args, count, names) : Py_NewRef(Py_None);
}

static bool are_bytes(PyObject *messages, size_t largest) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(messages); i++) {
        PyObject *message = PyTuple_GetItem(messages, i);
        if (!PyBytes_CheckExact(message) || (size_t)PyBytes_Size(message) > largest)
            return false;
    }
    return true;
}

/* How many were sent, or what ended it before the first. */
static Py_ssize_t send_all(ik_posix_queue *queue, PyObject *messages, const options *given) {
    int64_t deadline_ns = hot_deadline(given->seconds);
    Py_ssize_t done;
    for (done = 0; done < PyTuple_Size(messages); done++) {
        PyObject *message = PyTuple_GetItem(messages, done);
        int rc = -ETIMEDOUT;
        if (done % IN_A_ROW != IN_A_ROW - 1) /* then others may have the GIL for a moment */
            rc = send_at_once(queue, message, given->number);
        if (rc == -ETIMEDOUT)
            rc = send_waiting(queue, message, given->number, deadline_ns);
        if (rc < 0)
            return done && rc != -EINTR ? done : rc;
    }
    return done;
}

static PyObject *queue_send_many(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                 PyObject *names) {
    options given;
    if (count != 1 || !are_plain(args + 1, names, "priority", 0, &given))
        return hot_leave_to("_send_many", self, args, count, names);
    PyObject *result, *messages = PySequence_Tuple(args[0]); /* nobody else changes it */
    if (!messages)
        return NULL;
    PyObject *same[3] = {messages};
    Py_ssize_t rc = -EMSGSIZE;
    if (are_bytes(messages, queue_of(self)->max_message))
        rc = send_all(queue_of(self), messages, &given);
    if (rc >= 0)
        result = PyLong_FromSsize_t(rc);
    else if (rc == -EINTR)
        result = NULL;
    else if (rc == -ETIMEDOUT)
        result = fail_at_once("_send_many", self, same, 1, &given);
    else
        result = leave_with("_send_many", self, messages, args + 1, names);
    Py_DECREF(messages);
    return result;
}

static int64_t receive_waiting(ik_posix_queue *queue, ik_posix_message *ret_message,
                               const options *given) {
    int64_t len, deadline_ns = hot_deadline(given->seconds);
    do {
        Py_BEGIN_ALLOW_THREADS;
        len = ik_posix_queue_wait(queue, POLLIN, deadline_ns);
        if (len == 0)
            len = ik_posix_queue_receive(queue, ret_message, deadline_ns);
        Py_END_ALLOW_THREADS;
    } while (len == -EINTR && PyErr_CheckSignals() == 0);
    return len;
}

/* With the GIL dropped, another thread may receive meanwhile: so into memory of this call. */
static PyObject *recv_waiting(PyObject *self, PyObject *const *values, PyObject *names,
                              const options *given) {
    ik_posix_queue *queue = queue_of(self);
    ik_posix_message *message = PyMem_Malloc(sizeof *message + queue->max_message);
    if (!message)
        return PyErr_NoMemory();
    int64_t len = receive_waiting(queue, message, given);
    PyObject *data = len >= 0 ? PyBytes_FromStringAndSize(message->data, len) : NULL;
    PyMem_Free(message);
    if (len >= 0 || len == -EINTR)
        return data;
    return len == -ETIMEDOUT ? fail_at_once("_recv", self, (PyObject *[2]){0}, 0, given)
                             : hot_leave_to("_recv", self, values, 0, names);
}

static PyObject *queue_recv(PyObject *self, PyObject *const *args, Py_ssize_t count,
                            PyObject *names) {
    options given;
    if (count != 0 || !are_plain(args, names, NULL, 0, &given))
        return hot_leave_to("_recv", self, args, count, names);
    int64_t len = -ETIMEDOUT;
    if (queue_of(self)->max_message <= AT_ONCE)
        len = ik_posix_queue_receive(queue_of(self), received, IK_NOW);
    if (len >= 0)
        return PyBytes_FromStringAndSize(received->data, len);
    if (len == -ETIMEDOUT && given.seconds > 0)
        return recv_waiting(self, args, names, &given);
    return hot_leave_to("_recv", self, args, count, names);
}

/* Add what is ready to the list; NULL, and the list is gone, if there is no memory. */
static PyObject *receive_ready(ik_posix_queue *queue, PyObject *list, Py_ssize_t most) {
    while (list && PyList_Size(list) < most) {
        int64_t len = ik_posix_queue_receive(queue, received, IK_NOW);
        if (len < 0)
            break;
        PyObject *message = PyBytes_FromStringAndSize(received->data, len);
        if (!message || PyList_Append(list, message) < 0)
            Py_CLEAR(list);
        Py_XDECREF(message);
    }
    return list;
}

static PyObject *queue_recv_many(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                 PyObject *names) {
    ik_posix_queue *queue = queue_of(self);
    options given;
    Py_ssize_t most = (Py_ssize_t)queue->max_messages;
    if (count == 1 && PyLong_CheckExact(args[0])) {
        most = PyLong_AsSsize_t(args[0]);
        PyErr_Clear(); /* beyond any size, which is then -1 */
    }
    if (count > 1 || most < 1 || queue->max_message > AT_ONCE ||
        (count == 1 && args[0] != Py_None && !PyLong_CheckExact(args[0])) ||
        !are_plain(args + count, names, NULL, 0, &given))
        return hot_leave_to("_recv_many", self, args, count, names);
    most = most < IN_A_ROW ? most : IN_A_ROW;
    PyObject *list = receive_ready(queue, PyList_New(0), most);
    if (!list || PyList_Size(list))
        return list;
    PyObject *first = recv_waiting(self, args + count, names, &given);
    if (!first || PyList_Append(list, first) < 0)
        Py_CLEAR(list);
    Py_XDECREF(first);
    return receive_ready(queue, list, most);
}

static PyObject *queue_address(PyObject *self, PyObject *none) {
    (void)none;
    return PyLong_FromVoidPtr(queue_of(self));
}

static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    (void)args, (void)keywords;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *self = allocate(type, 0);
    if (self)
        *queue_of(self) = (ik_posix_queue){.fd = -1, .wake = -1, .state = IK_POSIX_CLOSED};
    return self;
}

PyDoc_STRVAR(
    send_doc,
    "send($self, data, *, priority=0, timeout=None)\n--\n\n"
    "Send one message; block while the queue is full.\n\n"
    "Args: data: bytes-like, C-contiguous, at most max_message bytes. priority: 0 to 32767,\n"
    "    the highest is received first. timeout: seconds.\n"
    "Raises: OSError EMSGSIZE for a larger message, before anything is sent; TimeoutError\n"
    "    (ETIMEDOUT); ValueError for another priority; OSError EBADF if the queue was opened\n"
    "    readonly; Closed, also when another thread closes meanwhile.\n"
    "Fork: usable on both sides. Threads and tasks: any number. See mq_send(3).\n");

PyDoc_STRVAR(recv_doc,
             "recv($self, *, timeout=None)\n--\n\n"
             "Receive the oldest message of the highest priority; block until there is one.\n\n"
             "Args: timeout: seconds.\n"
             "Returns: bytes.\n"
             "Raises: TimeoutError (ETIMEDOUT); OSError EBADF if the queue was opened writeonly;\n"
             "    Closed, also when another thread closes meanwhile.\n"
             "Fork: usable on both sides. Threads and tasks: any number. See mq_receive(3).\n");

PyDoc_STRVAR(
    send_many_doc,
    "send_many($self, messages, *, priority=0, timeout=None)\n--\n\n"
    "Send each of *messages* at one priority; block while the queue is full.\n\n"
    "Args: messages: any iterable; a list of bytes is fastest. timeout: seconds for all.\n"
    "Returns: how many were sent: all, or fewer when an error or the timeout came after the\n"
    "    first.\n"
    "Raises: as send(), if none was sent; EMSGSIZE before any is, if one of them is too large.\n");

PyDoc_STRVAR(
    recv_many_doc,
    "recv_many($self, max=None, *, timeout=None)\n--\n\n"
    "Receive the messages that are ready, at least one; block until there is one.\n\n"
    "Args: max: the most to return; None for as many as the queue can hold. However many there\n"
    "    are, no more than 256 come at once. timeout: seconds.\n"
    "Returns: a list of bytes.\n"
    "Raises: as recv(), if there was no message before the error.\n");

static PyMethodDef queue_methods[] = {
    {"send", (PyCFunction)(void (*)(void))queue_send, METH_FASTCALL | METH_KEYWORDS, send_doc},
    {"recv", (PyCFunction)(void (*)(void))queue_recv, METH_FASTCALL | METH_KEYWORDS, recv_doc},
    {"send_many", (PyCFunction)(void (*)(void))queue_send_many, METH_FASTCALL | METH_KEYWORDS,
     send_many_doc},
    {"recv_many", (PyCFunction)(void (*)(void))queue_recv_many, METH_FASTCALL | METH_KEYWORDS,
     recv_many_doc},
    {"_address", queue_address, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot queue_slots[] = {
    {Py_tp_new, queue_new},
    {Py_tp_methods, queue_methods},
    {0},
};

static PyType_Spec queue_spec = {
    .name = "ipckit._hot.PosixQueue",
    .basicsize = sizeof(queue_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = queue_slots,
};

/* --- System V queues ------------------------------------------------------------------------- */

/* The msgbuf of whoever has the GIL. */
static struct {
    long type;
    char text[AT_ONCE];
} one;

typedef struct {
    PyObject_HEAD int id; /* -1: everything is left to Python */
} sysv_object;

static int id_of(PyObject *self) {
    return ((sysv_object *)self)->id;
}

static bool sysv_send_now(PyObject *self, PyObject *message, long type) {
    size_t len = (size_t)PyBytes_Size(message);
    if (len > AT_ONCE || id_of(self) < 0)
        return false;
    one.type = type;
    memcpy(one.text, PyBytes_AsString(message), len);
    return msgsnd(id_of(self), &one, len, IPC_NOWAIT) == 0;
}

/* NULL without an exception: there is none now. */
static PyObject *sysv_recv_now(PyObject *self, long type, int flags) {
    ssize_t len =
        id_of(self) < 0 ? -1 : msgrcv(id_of(self), &one, AT_ONCE, type, IPC_NOWAIT | flags);
    return len < 0 ? NULL : PyBytes_FromStringAndSize(one.text, len);
}

static PyObject *sysv_send(PyObject *self, PyObject *const *args, Py_ssize_t count,
                           PyObject *names) {
    options given;
    if (count == 1 && PyBytes_CheckExact(args[0]) &&
        are_plain(args + 1, names, "type", 1, &given) && sysv_send_now(self, args[0], given.number))
        return Py_NewRef(Py_None);
    return hot_leave_to("_send", self, args, count, names);
}

static PyObject *sysv_recv(PyObject *self, PyObject *const *args, Py_ssize_t count,
                           PyObject *names) {
    options given;
    if (count == 0 && are_plain(args, names, "type", 0, &given)) {
        PyObject *message = sysv_recv_now(self, given.number, 0);
        if (message || PyErr_Occurred())
            return message;
    }
    return hot_leave_to("_recv", self, args, count, names);
}

/* (messages, first, type): how many of the tuple of bytes went, from the first on. */
static PyObject *sysv_send_some(PyObject *self, PyObject *args) {
    PyObject *messages;
    Py_ssize_t first;
    long type;
    if (!PyArg_ParseTuple(args, "O!nl", &PyTuple_Type, &messages, &first, &type))
        return NULL;
    Py_ssize_t end = PyTuple_Size(messages), i = first;
    if (end > first + IN_A_ROW)
        end = first + IN_A_ROW;
    while (i < end && sysv_send_now(self, PyTuple_GetItem(messages, i), type))
        i++;
    return PyLong_FromSsize_t(i - first);
}

/* (most, type, all_but): a list of those that are there; None if only Python can tell. */
static PyObject *sysv_recv_some(PyObject *self, PyObject *args) {
    Py_ssize_t most;
    long type;
    int all_but;
    if (!PyArg_ParseTuple(args, "nlp", &most, &type, &all_but))
        return NULL;
    PyObject *message, *list = PyList_New(0);
    for (Py_ssize_t i = 0; list && i < most && i < IN_A_ROW; i++) {
        if (!(message = sysv_recv_now(self, type, all_but ? MSG_EXCEPT : 0)))
            break;
        if (PyList_Append(list, message) < 0)
            Py_CLEAR(list);
        Py_DECREF(message);
    }
    if (PyErr_Occurred())
        Py_CLEAR(list);
    if (!list || PyList_Size(list) || (id_of(self) >= 0 && errno == ENOMSG))
        return list;
    Py_DECREF(list);
    return Py_NewRef(Py_None);
}

static PyObject *sysv_at_once(PyObject *self, PyObject *id) {
    ((sysv_object *)self)->id = (int)PyLong_AsLong(id);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *sysv_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    (void)args, (void)keywords;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *self = allocate(type, 0);
    if (self)
        ((sysv_object *)self)->id = -1;
    return self;
}

PyDoc_STRVAR(
    sysv_send_doc,
    "send($self, data, *, type=1, timeout=None)\n--\n\n"
    "Send one message; block while the queue is full.\n\n"
    "Args: data: bytes-like. type: 1 or more. timeout: seconds.\n"
    "Raises: TimeoutError (ETIMEDOUT), and then it was not sent; OSError EMSGSIZE for one over\n"
    "    kernel.msgmax, or over what the queue may ever hold; EIDRM if the queue was removed;\n"
    "    PermissionError (EACCES); ValueError for a bad type; Closed.\n"
    "Fork: usable on both sides. Threads: any number. See msgsnd(2).\n");

PyDoc_STRVAR(
    sysv_recv_doc,
    "recv($self, *, type=0, all_but=False, timeout=None)\n--\n\n"
    "Receive one message; block until there is one.\n\n"
    "Args: type: 0: the oldest; above 0: the oldest of that type; below 0: of the lowest type\n"
    "    that is at most -type the oldest. all_but: any type but that one (MSG_EXCEPT, Linux\n"
    "    only). timeout: seconds.\n"
    "Raises: TimeoutError (ETIMEDOUT); OSError EIDRM if the queue was removed; PermissionError\n"
    "    (EACCES); ValueError for all_but without a type; Closed.\n"
    "Fork: usable on both sides. Threads: any number. See msgrcv(2).\n");

static PyMethodDef sysv_methods[] = {
    {"send", (PyCFunction)(void (*)(void))sysv_send, METH_FASTCALL | METH_KEYWORDS, sysv_send_doc},
    {"recv", (PyCFunction)(void (*)(void))sysv_recv, METH_FASTCALL | METH_KEYWORDS, sysv_recv_doc},
    {"_send_some", sysv_send_some, METH_VARARGS, NULL},
    {"_recv_some", sysv_recv_some, METH_VARARGS, NULL},
    {"_at_once", sysv_at_once, METH_O, NULL},
    {0},
};

static PyType_Slot sysv_slots[] = {
    {Py_tp_new, sysv_new},
    {Py_tp_methods, sysv_methods},
    {0},
};

static PyType_Spec sysv_spec = {
    .name = "ipckit._hot.SysvQueue",
    .basicsize = sizeof(sysv_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = sysv_slots,
};

/* --- for the module -------------------------------------------------------------------------- */

bool hot_add_kernel(PyObject *module) {
    if (!received)
        received = PyMem_Malloc(sizeof *received + AT_ONCE);
    if (!received)
        PyErr_NoMemory();
    return received && hot_add_class(module, &queue_spec) && hot_add_class(module, &sysv_spec);
}
