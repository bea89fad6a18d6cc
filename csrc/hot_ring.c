/* SPDX-License-Identifier: MIT
 *
 * hot_ring.c - ipckit._hot.Ends: the verbs of whatever sends into one ring and receives from one,
 * which may be the same.
 *
 * A call first tries with the GIL held; only to wait, or to copy much, is it dropped. Who is inside
 * an end excludes the others by the end itself (ring.h), so no other lock is needed here. What goes
 * wrong is told to the Python method _fail(rc, verb, size, limit), which raises; a receiver of a
 * queue that waits calls _lull(verb) now and then.
 */
#include <errno.h>
#include <math.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "hot.h"
#include "ring.h"

enum { SEND = IK_RING_SEND, RECV = IK_RING_RECV };

/* Bytes for which the GIL isn't worth dropping; messages in one commit, and in one call. */
enum { AT_ONCE = 32768, IN_A_ROW = 64, AT_MOST = 1024 };

/* Slices, mostly of 100 ms, after which a receiver looks whether producers seem to live, and
 * whether they do. */
enum { LOOK_SLICES = 4, PROOF_SLICES = 100 };

/* Whose bells: ours for what comes and for room, the other's, and the other's life. */
enum { DATA, ROOM, THEIR_DATA, THEIR_ROOM, LIFE, BELLS };

typedef struct {
    PyObject_HEAD ik_ring rings[2]; /* into which we send, from which we receive */
    PyObject *views[2];             /* of their memory, which they keep there; NULL: closed */
    PyObject *loans[2];             /* of the end: the view that reserve() or peek() gave */
    uint64_t loaned[2];             /* its bytes */
    int lender[2];                  /* the thread that is inside for it, or 0 */
    ik_ring_progress progress[2]; /* of a long message by asyncio, which waits between the steps */
    PyObject *sending, *pending;  /* those */
    PyObject *kept;  /* received whole by a call that raised, or by a send: the next to return */
    PyObject *later; /* a deque of those after it; NULL: there is no inbox */
    uint64_t kept_bytes; /* what both cost */
    uint64_t max_inbox;  /* up to which a send that waits takes in what comes; 0: it doesn't */
    int receivers;       /* threads that wait for a message: then it is theirs */
    int bells[BELLS];    /* which are ours; -1: none */
    uint64_t max_message;
    int users;      /* calls that dropped the GIL: the memory stays until they are back */
    bool closed;    /* also before there is a ring */
    bool unused;    /* the first verb in this process calls _join() */
    bool listening; /* somebody polls our bell */
    hot_queue queue;
} ends_object;

static ends_object *ends_of(PyObject *self) {
    return (ends_object *)self;
}

/* --- arguments ------------------------------------------------------------------------------- */

/* The one keyword of all verbs. Infinite: for ever. */
static bool read_timeout(const char *verb, PyObject *const *values, PyObject *names,
                         double *ret_seconds) {
    *ret_seconds = INFINITY;
    Py_ssize_t count = names ? PyTuple_GET_SIZE(names) : 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *name = PyTuple_GET_ITEM(names, i);
        if (PyUnicode_CompareWithASCIIString(name, "timeout") != 0) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument %R", verb, name);
            return false;
        }
        if (!hot_seconds(values[i], "timeout", ret_seconds))
            return false;
    }
    return true;
}

static bool begin_use(ends_object *ends) {
    ends->unused = false;
    PyObject *none = PyObject_CallMethod((PyObject *)ends, "_join", NULL);
    Py_XDECREF(none);
    return none;
}

/* The role of the side is taken in the table of a queue. */
static bool take_part(ends_object *ends, int side) {
    PyObject *none = PyObject_CallMethod((PyObject *)ends, "_take_part", "i", 1 << side);
    Py_XDECREF(none);
    return none;
}

/* False with an exception. Python may run here, and another thread close what is used: that is
 * looked at last. */
static bool can_begin(ends_object *ends, int side, const char *verb) {
    if (!ends->closed && ends->unused && !begin_use(ends))
        return false;
    if (!ends->closed && ends->queue.lacks & 1u << side && !take_part(ends, side))
        return false;
    if (!ends->closed)
        return true;
    Py_XDECREF(PyObject_CallMethod((PyObject *)ends, "_fail", "isKK", -EBADF, verb, 0ull, 0ull));
    return false;
}

static bool read_call(ends_object *ends, int side, const char *verb, PyObject *const *args,
                      Py_ssize_t count, Py_ssize_t least, Py_ssize_t most, PyObject *names,
                      double *ret_seconds) {
    if (count < least || count > most) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd positional arguments, not %zd", verb, most,
                     count);
        return false;
    }
    return read_timeout(verb, args + count, names, ret_seconds) && can_begin(ends, side, verb);
}

/* --- failing and looking around -------------------------------------------------------------- */

/* Always NULL. */
static PyObject *fail(ends_object *ends, int64_t rc, const char *verb, uint64_t size,
                      uint64_t limit) {
    if (rc == -EINTR && PyErr_Occurred())
        return NULL;
    PyObject *none =
        PyObject_CallMethod((PyObject *)ends, "_fail", "isKK", ends->closed ? -EBADF : (int)rc,
                            verb, (unsigned long long)size, (unsigned long long)limit);
    if (none) {
        PyErr_Format(PyExc_SystemError, "%s: _fail(%d) returned", verb, (int)rc);
        Py_DECREF(none);
    }
    return NULL;
}

/* Whether it is time to look if the producers are dead; or they left, and this is the end. Python
 * is not called each slice, since that is most of what an idle receiver costs. */
static bool may_be_over(hot_queue *queue) {
    if (!queue->table || !(queue->lacks & IK_QUEUE_PRODUCER) ||
        !ik_queue_had_producer(queue->table))
        return false;
    if (ik_queue_count(queue->table, IK_QUEUE_PRODUCER) == 0)
        return true;
    uint32_t slices = ++queue->slices;
    return slices % PROOF_SLICES == 0 ||
           (slices % LOOK_SLICES == 0 && !ik_queue_producer_seems_alive(queue->table));
}

/* After a signal or a slice. False with an exception, or if the object was closed meanwhile. The
 * verb is of a receiver that has begun no message yet, and ends when there will be none. */
static bool look_around(ends_object *ends, const char *verb) {
    if (PyErr_CheckSignals() < 0 || ends->closed)
        return false;
    if (!verb || !may_be_over(&ends->queue))
        return true;
    PyObject *none = PyObject_CallMethod((PyObject *)ends, "_lull", "s", verb);
    Py_XDECREF(none);
    return none && !ends->closed;
}

/* The memory and the bells go with the last who uses them. */
static void use(ends_object *ends) {
    ends->users++;
}

static void drop_views(ends_object *ends) {
    for (int i = 0; i < BELLS; i++) {
        bool again = false; /* one ring has the same bells in both */
        for (int before = 0; before < i; before++)
            again |= ends->bells[before] == ends->bells[i];
        if (ends->bells[i] >= 0 && !again)
            close(ends->bells[i]);
    }
    memset(ends->bells, -1, sizeof ends->bells);
    for (int side = 0; side < 2; side++)
        Py_CLEAR(ends->views[side]);
}

static void unuse(ends_object *ends) {
    if (--ends->users == 0 && ends->closed)
        drop_views(ends);
}

#define WITHOUT_GIL(ends, statement)                                                               \
    do {                                                                                           \
        use(ends);                                                                                 \
        Py_BEGIN_ALLOW_THREADS;                                                                    \
        statement;                                                                                 \
        Py_END_ALLOW_THREADS;                                                                      \
        unuse(ends);                                                                               \
    } while (0)

/* --- what the table of a queue shows of us ------------------------------------------------------
 */

/* Under the GIL; others read at any moment. */
static void add(uint32_t *word, uint32_t change) {
    __atomic_store_n(word, __atomic_load_n(word, __ATOMIC_RELAXED) + change, __ATOMIC_RELAXED);
}

static void show(ends_object *ends, int side) {
    if (ends->queue.doing)
        add(&ends->queue.doing->inside[side], 1);
}

static void show_end(ends_object *ends, int side) {
    struct timespec now;
    if (!ends->queue.doing)
        return;
    add(&ends->queue.doing->inside[side], (uint32_t)-1);
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    __atomic_store_n(&ends->queue.doing->active_ns, (int64_t)now.tv_sec * 1000000000 + now.tv_nsec,
                     __ATOMIC_RELAXED);
}

/* From use() to unuse(), of a call that waits. */
static void use_waiting(ends_object *ends) {
    use(ends);
    if (ends->queue.doing)
        add(&ends->queue.doing->waiting, 1);
}

static void unuse_waiting(ends_object *ends) {
    if (ends->queue.doing)
        add(&ends->queue.doing->waiting, (uint32_t)-1);
    unuse(ends);
}

/* --- sending --------------------------------------------------------------------------------- */

static int take_in(ends_object *ends);
static bool keep_listening(ends_object *ends);

static bool is_past(int64_t deadline_ns) {
    return deadline_ns != IK_FOREVER && ik_wait_now() >= deadline_ns;
}

/* Send, and take in what comes while there is no room, because the peer may be doing just the same.
 * As ik_ring_send(). */
static int send_and_take_in(ends_object *ends, ik_ring_progress *progress, const void *data,
                            uint64_t len, int64_t deadline_ns) {
    ik_ring *out = &ends->rings[SEND], *in = &ends->rings[RECV];
    for (bool listens = false; !ends->closed;) {
        int rc, took;
        WITHOUT_GIL(ends, rc = ik_ring_send(out, progress, data, len, IK_RING_STEP));
        if (rc != -EINTR || is_past(deadline_ns))
            return rc == -EINTR ? -ETIMEDOUT : rc;
        if ((took = take_in(ends)) > 0) {
            listens = false;
        } else if (listens) {
            WITHOUT_GIL(ends, rc = ik_ring_sleep_both(out, took == 0 ? in : NULL, deadline_ns));
            if (rc < 0)
                return rc;
            listens = false;
        } else {
            WITHOUT_GIL(ends, listens = !ik_ring_spin(out, SEND));
            if (listens && !ends->closed)
                ik_ring_listen(out, SEND);
            if (listens && !ends->closed && took == 0)
                ik_ring_listen(in, RECV);
        }
        if (PyErr_CheckSignals() < 0)
            return -EINTR;
    }
    return -EBADF;
}

/* Another thread that is inside takes in for us. */
static int wait_for_turn(ends_object *ends, int64_t deadline_ns) {
    int rc = ik_ring_enter(&ends->rings[SEND], SEND, IK_NOW);
    if (rc == -ETIMEDOUT)
        WITHOUT_GIL(ends, rc = ik_ring_enter(&ends->rings[SEND], SEND, deadline_ns));
    if (rc == 0)
        ik_ring_leave(&ends->rings[SEND], SEND);
    return rc;
}

static int send_both_ways(ends_object *ends, ik_ring_progress *progress, const void *data,
                          uint64_t len, int64_t deadline_ns) {
    int rc = progress->inside ? 0 : wait_for_turn(ends, deadline_ns);
    if (rc == 0)
        rc = send_and_take_in(ends, progress, data, len, deadline_ns);
    if (!ends->closed)
        keep_listening(ends); /* also to what is kept now */
    return rc;
}

static int send_waiting(ends_object *ends, const void *data, uint64_t len, double seconds) {
    int64_t deadline_ns = hot_deadline(seconds);
    ik_ring_progress progress = {0};
    int rc;
    use_waiting(ends);
    do {
        if (ends->max_inbox)
            rc = send_both_ways(ends, &progress, data, len, deadline_ns);
        else
            WITHOUT_GIL(ends,
                        rc = ik_ring_send(&ends->rings[SEND], &progress, data, len, deadline_ns));
    } while (rc == -EINTR && !PyErr_Occurred() && look_around(ends, NULL));
    if (rc < 0 && ik_ring_give_up(&ends->rings[SEND], SEND, &progress) && !PyErr_Occurred())
        rc = 0; /* it was received at the last moment */
    unuse_waiting(ends);
    return rc;
}

static int send_bytes(ends_object *ends, const void *data, uint64_t len, double seconds) {
    int rc = -ETIMEDOUT;
    ik_ring_progress progress = {0};
    if (len > ends->max_message)
        return -EMSGSIZE;
    if (len <= AT_ONCE && len <= ends->rings[SEND].largest)
        rc = ik_ring_send(&ends->rings[SEND], &progress, data, len, IK_NOW);
    else if (seconds == 0)
        WITHOUT_GIL(ends, rc = ik_ring_send(&ends->rings[SEND], &progress, data, len, IK_NOW));
    return rc == -ETIMEDOUT && seconds > 0 ? send_waiting(ends, data, len, seconds) : rc;
}

static int send_shown(ends_object *ends, const void *data, uint64_t len, double seconds) {
    show(ends, SEND);
    int rc = send_bytes(ends, data, len, seconds);
    show_end(ends, SEND);
    return rc;
}

static PyObject *ends_send(PyObject *self, PyObject *const *args, Py_ssize_t count,
                           PyObject *names) {
    ends_object *ends = ends_of(self);
    double seconds;
    Py_buffer data;
    int rc;
    if (!read_call(ends, SEND, "send", args, count, 1, 1, names, &seconds))
        return NULL;
    if (PyBytes_CheckExact(args[0])) {
        data.len = PyBytes_GET_SIZE(args[0]);
        rc = send_shown(ends, PyBytes_AS_STRING(args[0]), (uint64_t)data.len, seconds);
    } else {
        if (!hot_buffer(args[0], "data", false, &data))
            return NULL;
        rc = send_shown(ends, data.buf, (uint64_t)data.len, seconds);
        PyBuffer_Release(&data);
    }
    return rc < 0 ? fail(ends, rc, "send", (uint64_t)data.len, ends->max_message)
                  : Py_NewRef(Py_None);
}

/* All are bytes-like and none is too large, or an exception. */
static bool can_be_sent(ends_object *ends, PyObject *messages) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(messages); i++) {
        PyObject *message = PyTuple_GET_ITEM(messages, i);
        Py_ssize_t len = PyBytes_Size(message);
        if (len < 0) {
            Py_buffer data;
            PyErr_Clear();
            if (!hot_buffer(message, "messages", false, &data))
                return false;
            len = data.len;
            PyBuffer_Release(&data);
        }
        if ((uint64_t)len > ends->max_message) {
            fail(ends, -EMSGSIZE, "send_many", (uint64_t)len, ends->max_message);
            return false;
        }
    }
    return true;
}

static int stage_bytes(ik_ring *ring, const void *data, uint64_t len) {
    int rc = 0;
    void *room = ik_ring_reserve(ring, len, &rc);
    if (room) {
        memcpy(room, data, len);
        ik_ring_stage(ring, len);
    }
    return rc;
}

/* Stage one; the end is entered. 0, or -EAGAIN and so on, as ik_ring_reserve(). */
static int stage_one(ik_ring *ring, PyObject *message) {
    Py_buffer data;
    if (PyBytes_Check(message))
        return stage_bytes(ring, PyBytes_AS_STRING(message), (uint64_t)PyBytes_GET_SIZE(message));
    if (!hot_buffer(message, "messages", false, &data))
        return -EINTR; /* with an exception */
    int rc = stage_bytes(ring, data.buf, (uint64_t)data.len);
    PyBuffer_Release(&data);
    return rc;
}

/* Send what has room, from the first on. How many; 0 with *ret_error for what hinders the next. */
static Py_ssize_t send_row(ends_object *ends, PyObject *messages, Py_ssize_t first,
                           int *ret_error) {
    ik_ring *ring = &ends->rings[SEND];
    Py_ssize_t done = first;
    int rc = ik_ring_enter(ring, SEND, IK_NOW);
    if (rc == 0) {
        while (done < PyTuple_GET_SIZE(messages) && done - first < AT_MOST && rc == 0) {
            rc = stage_one(ring, PyTuple_GET_ITEM(messages, done));
            done += rc == 0;
            if (rc == 0 && (done - first) % IN_A_ROW == 0)
                ik_ring_commit(ring, SEND);
        }
        ik_ring_commit(ring, SEND);
        ik_ring_leave(ring, SEND);
    }
    *ret_error = rc;
    return done - first;
}

/* One that must wait for its turn or its room, or is long. */
static int send_slowly(ends_object *ends, PyObject *message, int64_t deadline_ns) {
    Py_buffer data;
    if (!hot_buffer(message, "messages", false, &data))
        return -EINTR;
    double left = deadline_ns == IK_FOREVER ? INFINITY
                  : deadline_ns == IK_NOW   ? 0
                                            : (double)(deadline_ns - ik_wait_now()) / 1e9;
    int rc = send_bytes(ends, data.buf, (uint64_t)data.len, left < 0 ? 0 : left);
    PyBuffer_Release(&data);
    return rc;
}

static PyObject *send_all(ends_object *ends, PyObject *messages, double seconds) {
    int64_t deadline_ns = hot_deadline(seconds);
    Py_ssize_t done = 0, total = PyTuple_GET_SIZE(messages);
    int rc = 0;
    while (done < total && (rc >= 0 || rc == -EAGAIN) && !ends->closed) {
        done += send_row(ends, messages, done, &rc);
        if (done < total && rc < 0 && rc != -EPIPE && rc != -EBADMSG && !PyErr_Occurred()) {
            rc = send_slowly(ends, PyTuple_GET_ITEM(messages, done), deadline_ns);
            done += rc == 0;
        } else if (rc == 0) { /* a row is full: others may have the GIL for a moment */
            WITHOUT_GIL(ends, (void)0);
        }
    }
    if (PyErr_Occurred() || (rc < 0 && done == 0 && total > 0))
        return fail(ends, rc, "send_many", 0, ends->max_message);
    return PyLong_FromSsize_t(done);
}

static PyObject *ends_send_many(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *names) {
    ends_object *ends = ends_of(self);
    double seconds;
    if (!read_call(ends, SEND, "send_many", args, count, 1, 1, names, &seconds))
        return NULL;
    PyObject *result = NULL, *messages = PySequence_Tuple(args[0]); /* nobody else changes it */
    if (messages && can_be_sent(ends, messages)) {
        show(ends, SEND);
        result = send_all(ends, messages, seconds);
        show_end(ends, SEND);
    }
    Py_XDECREF(messages);
    return result;
}

/* --- receiving: into a new bytes object, or a buffer of the caller's ---------------------------
 */

typedef struct {
    PyObject *bytes; /* made when the length is known, if there is no buffer */
    char *buffer;
    uint64_t size;
    bool to_the_end; /* of the timeout it waits, also where nothing can come any more */
} target;

static char *memory_for(target *into, uint64_t len) {
    if (into->buffer)
        return into->buffer;
    into->bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)len);
    return into->bytes ? PyBytes_AS_STRING(into->bytes) : NULL;
}

static void keep_message(ends_object *ends, PyObject *message) {
    if (ends->kept) {
        PyObject *none = PyObject_CallMethod(ends->later, "append", "O", message);
        Py_XDECREF(none);
    } else {
        ends->kept = Py_NewRef(message);
    }
    ends->kept_bytes += (uint64_t)PyBytes_GET_SIZE(message) + 64; /* an empty one is not free */
}

/* The message that is kept first was taken. */
static void drop_kept(ends_object *ends) {
    ends->kept_bytes -= (uint64_t)PyBytes_GET_SIZE(ends->kept) + 64;
    PyObject *next = NULL;
    if (ends->later && PyObject_IsTrue(ends->later) == 1)
        next = PyObject_CallMethod(ends->later, "popleft", NULL);
    Py_XSETREF(ends->kept, next);
}

/* A handler raised amid a long message. If all of it is there, its sender thinks it received, so it
 * is kept; else it will be sent again. */
static void give_up_receiving(ends_object *ends, char *memory, uint64_t len,
                              ik_ring_progress *progress) {
    ik_ring *ring = &ends->rings[RECV];
    PyObject *kind, *value, *trace;
    if (ik_ring_recv_stream(ring, progress, memory, len, IK_RING_STEP) != 0) {
        ik_ring_give_up(ring, RECV, progress);
        return;
    }
    PyErr_Fetch(&kind, &value, &trace);
    PyObject *message = PyBytes_FromStringAndSize(memory, (Py_ssize_t)len);
    if (message)
        keep_message(ends, message);
    Py_XDECREF(message);
    PyErr_Restore(kind, value, trace);
}

/* Receive the long message at which we are, and leave. */
static int take_stream(ends_object *ends, target *into, uint64_t len, int64_t deadline_ns) {
    ik_ring *ring = &ends->rings[RECV];
    ik_ring_progress progress = {0};
    char *memory = memory_for(into, len);
    int rc = -EINTR; /* with an exception */
    if (!memory) {
        ik_ring_leave(ring, RECV);
        return rc;
    }
    do {
        WITHOUT_GIL(ends, rc = ik_ring_recv_stream(ring, &progress, memory, len, deadline_ns));
    } while (rc == -EINTR && look_around(ends, NULL));
    if (rc == -EINTR)
        give_up_receiving(ends, memory, len, &progress);
    if (rc < 0)
        Py_CLEAR(into->bytes);
    return rc;
}

static void copy(ends_object *ends, void *to, const void *from, uint64_t len) {
    if (len <= AT_ONCE)
        memcpy(to, from, len);
    else
        WITHOUT_GIL(ends, memcpy(to, from, len));
}

/* Take the next message and leave; the end is entered. Its length; -EAGAIN: there is none. */
static int64_t take(ends_object *ends, target *into, int64_t deadline_ns) {
    ik_ring *ring = &ends->rings[RECV];
    const void *data;
    uint64_t len;
    int rc = ik_ring_look(ring, &data, &len);
    if (rc >= 0 && (len > ends->max_message || (into->buffer && len > into->size))) {
        into->size = len; /* for the error */
        rc = -EMSGSIZE;
    }
    if (rc == 0) {
        rc = take_stream(ends, into, len, deadline_ns);
        return rc < 0 ? rc : (int64_t)len;
    }
    char *memory = rc > 0 ? memory_for(into, len) : NULL;
    if (memory) {
        copy(ends, memory, data, len);
        ik_ring_step(ring, len);
        ik_ring_commit(ring, RECV);
    }
    ik_ring_leave(ring, RECV);
    return rc < 0 ? rc : memory ? (int64_t)len : -EINTR;
}

static int64_t take_kept(ends_object *ends, target *into) {
    uint64_t len = (uint64_t)PyBytes_GET_SIZE(ends->kept);
    if (into->buffer && len > into->size) {
        into->size = len;
        return -EMSGSIZE;
    }
    if (into->buffer)
        memcpy(into->buffer, PyBytes_AS_STRING(ends->kept), len);
    else
        into->bytes = Py_NewRef(ends->kept);
    drop_kept(ends);
    return (int64_t)len;
}

/* Go on with the long message that is pending, as ik_ring_recv_stream(). While a thread does, it is
 * pending no more, and the others wait for their turn. */
static int go_on(ends_object *ends, int64_t deadline_ns, PyObject **ret_message) {
    ik_ring *ring = &ends->rings[RECV];
    ik_ring_progress *progress = &ends->progress[RECV];
    PyObject *message = ends->pending;
    char *memory = PyBytes_AS_STRING(message);
    uint64_t len = (uint64_t)PyBytes_GET_SIZE(message);
    int rc;
    ends->pending = NULL;
    if (ends->max_inbox)
        ik_ring_resume(ring);
    WITHOUT_GIL(ends, rc = ik_ring_recv_stream(ring, progress, memory, len, deadline_ns));
    if (rc == -EINTR && ends->closed)
        ik_ring_give_up(ring, RECV, progress);
    if (rc == -EINTR && !ends->closed) {
        if (ends->max_inbox)
            ik_ring_park(ring);
        ends->pending = message;
        return rc;
    }
    *ret_message = rc == 0 ? message : NULL;
    if (rc != 0)
        Py_DECREF(message);
    return rc;
}

static int64_t take_pending(ends_object *ends, target *into, int64_t deadline_ns) {
    PyObject *message = NULL;
    uint64_t len = (uint64_t)PyBytes_GET_SIZE(ends->pending);
    if (into->buffer && len > into->size) {
        into->size = len;
        return -EMSGSIZE;
    }
    int rc = go_on(ends, deadline_ns == IK_NOW ? IK_RING_STEP : deadline_ns, &message);
    if (rc < 0)
        return rc == -EINTR && deadline_ns == IK_NOW ? -EAGAIN : rc;
    if (into->buffer) {
        memcpy(into->buffer, PyBytes_AS_STRING(message), len);
        Py_DECREF(message);
    } else {
        into->bytes = message;
    }
    return (int64_t)len;
}

static int64_t take_now(ends_object *ends, target *into) {
    if (ends->kept)
        return take_kept(ends, into);
    if (ends->pending)
        return take_pending(ends, into, IK_NOW);
    int64_t rc = ik_ring_enter(&ends->rings[RECV], RECV, IK_NOW);
    return rc == 0 ? take(ends, into, IK_NOW) : rc;
}

static int64_t wait_and_take(ends_object *ends, target *into, int64_t deadline_ns) {
    int64_t rc;
    if (ends->kept)
        return take_kept(ends, into);
    if (ends->pending)
        return take_pending(ends, into, deadline_ns);
    WITHOUT_GIL(ends, rc = ik_ring_wait_message(&ends->rings[RECV], deadline_ns));
    return rc == 0 ? take(ends, into, deadline_ns) : rc;
}

static int64_t take_waiting(ends_object *ends, target *into, double seconds) {
    int64_t rc, deadline_ns = hot_deadline(seconds);
    use_waiting(ends);
    ends->receivers++;
    for (;;) {
        rc = wait_and_take(ends, into, deadline_ns);
        if (rc != -EINTR && rc != -EAGAIN && rc != -ECONNABORTED)
            break;
        if (rc != -EINTR && is_past(deadline_ns))
            rc = -ETIMEDOUT;
        else if (PyErr_Occurred() || !look_around(ends, into->to_the_end ? NULL : "recv"))
            rc = -EINTR;
        else
            continue;
        break;
    }
    ends->receivers--;
    unuse_waiting(ends);
    return rc;
}

/* For who polls: the bell is silent if, and only if, there is nothing. */
static bool keep_listening(ends_object *ends) {
    bool rings = ends->listening && ik_ring_listen(&ends->rings[RECV], RECV);
    if (ends->listening && ends->kept)
        ik_ring_wake(&ends->rings[RECV], RECV);
    return rings || ends->kept;
}

static bool is_not_yet(int64_t rc) {
    return rc == -EAGAIN || rc == -ETIMEDOUT || rc == -ECONNABORTED;
}

static int64_t receive(ends_object *ends, target *into, double seconds) {
    use(ends);
    show(ends, RECV);
    int64_t rc = take_now(ends, into);
    if (is_not_yet(rc) && seconds > 0 && ik_ring_glance(&ends->rings[RECV], RECV))
        rc = take_now(ends, into);
    if (is_not_yet(rc))
        rc = seconds > 0 ? take_waiting(ends, into, seconds) : -ETIMEDOUT;
    show_end(ends, RECV);
    if (!ends->closed)
        keep_listening(ends);
    unuse(ends);
    return rc;
}

static PyObject *ends_recv(PyObject *self, PyObject *const *args, Py_ssize_t count,
                           PyObject *names) {
    ends_object *ends = ends_of(self);
    double seconds;
    target into = {0};
    if (!read_call(ends, RECV, "recv", args, count, 0, 0, names, &seconds))
        return NULL;
    int64_t rc = receive(ends, &into, seconds);
    return rc >= 0 ? into.bytes : fail(ends, rc, "recv", into.size, ends->max_message);
}

static PyObject *ends_recv_into(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *names) {
    ends_object *ends = ends_of(self);
    double seconds;
    Py_buffer room;
    if (!read_call(ends, RECV, "recv_into", args, count, 1, 1, names, &seconds))
        return NULL;
    if (!hot_buffer(args[0], "buffer", true, &room))
        return NULL;
    target into = {.buffer = room.buf ? room.buf : "", .size = (uint64_t)room.len};
    int64_t rc = receive(ends, &into, seconds);
    uint64_t limit =
        (uint64_t)room.len < ends->max_message ? (uint64_t)room.len : ends->max_message;
    PyBuffer_Release(&room);
    return rc < 0 ? fail(ends, rc, "recv_into", into.size, limit) : PyLong_FromLongLong(rc);
}

/* Add those that are whole and there to the list; the end is entered. NULL: no memory, and then
 * none is taken. */
static PyObject *take_row(ends_object *ends, PyObject *list, Py_ssize_t most) {
    ik_ring *ring = &ends->rings[RECV];
    const void *data;
    uint64_t len;
    while (list && PyList_GET_SIZE(list) < most && ik_ring_look(ring, &data, &len) == 1 &&
           len <= ends->max_message) {
        PyObject *message = PyBytes_FromStringAndSize(data, (Py_ssize_t)len);
        if (!message || PyList_Append(list, message) < 0)
            Py_CLEAR(list);
        Py_XDECREF(message);
        ik_ring_step(ring, len);
    }
    if (list && PyList_GET_SIZE(list))
        ik_ring_commit(ring, RECV);
    ik_ring_leave(ring, RECV);
    return list;
}

/* Nothing is to be returned before what is in the ring. */
static bool has_none(const ends_object *ends) {
    return !ends->kept && !ends->pending;
}

/* At least one, or NULL with an exception. */
static PyObject *receive_row(ends_object *ends, const char *verb, Py_ssize_t most, double seconds,
                             bool to_the_end) {
    PyObject *list = PyList_New(0);
    if (list && has_none(ends) && ik_ring_enter(&ends->rings[RECV], RECV, IK_NOW) == 0)
        list = take_row(ends, list, most);
    if (!list || PyList_GET_SIZE(list))
        return list;
    target into = {.to_the_end = to_the_end};
    int64_t rc = receive(ends, &into, seconds);
    if (rc < 0) {
        Py_DECREF(list);
        return fail(ends, rc, verb, into.size, ends->max_message);
    }
    if (PyList_Append(list, into.bytes) < 0)
        Py_CLEAR(list);
    Py_DECREF(into.bytes);
    while (list && ends->kept && PyList_GET_SIZE(list) < most) {
        if (PyList_Append(list, ends->kept) < 0)
            Py_CLEAR(list);
        else
            drop_kept(ends);
    }
    if (list && PyList_GET_SIZE(list) < most && has_none(ends) && !ends->closed &&
        ik_ring_enter(&ends->rings[RECV], RECV, IK_NOW) == 0)
        list = take_row(ends, list, most);
    return list;
}

static PyObject *receive_shown(ends_object *ends, const char *verb, Py_ssize_t most, double seconds,
                               bool to_the_end) {
    show(ends, RECV);
    most = most < AT_MOST ? most : AT_MOST;
    PyObject *list = receive_row(ends, verb, most, seconds, to_the_end);
    show_end(ends, RECV);
    if (list && !ends->closed)
        keep_listening(ends);
    return list;
}

static bool has_keyword(PyObject *names, const char *name) {
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++)
        if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), name) == 0)
            return true;
    return false;
}

static PyObject *ends_recv_many(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *names) {
    ends_object *ends = ends_of(self);
    double seconds;
    int64_t most = AT_MOST;
    if (count == 0 && has_keyword(names, "max"))
        return hot_leave_to("_recv_many", self, args, count, names);
    if (count == 1 && args[0] != Py_None && !hot_integer(args[0], "max", 1, INT64_MAX, &most))
        return NULL;
    if (!read_call(ends, RECV, "recv_many", args, count, 0, 1, names, &seconds))
        return NULL;
    return receive_shown(ends, "recv_many", most, seconds, false);
}

/* --- in place -------------------------------------------------------------------------------- */

/* The part of the ring's memory as a view, which the caller of reserve() or peek() gets. */
static PyObject *lend(ends_object *ends, int side, const void *data, uint64_t len) {
    ik_ring *ring = &ends->rings[side];
    Py_ssize_t start = (const unsigned char *)data - (const unsigned char *)ring->shared;
    PyObject *part = PySequence_GetSlice(ends->views[side], start, start + (Py_ssize_t)len);
    if (part && side == RECV) {
        PyObject *writable = part;
        part = PyObject_CallMethod(writable, "toreadonly", NULL);
        Py_DECREF(writable);
    }
    if (!part) {
        ik_ring_leave(ring, side);
        return NULL;
    }
    Py_XSETREF(ends->loans[side], Py_NewRef(part));
    ends->loaned[side] = len;
    ends->lender[side] = ik_wait_thread();
    use(ends);
    return part;
}

static PyObject *lend_kept(ends_object *ends) {
    PyObject *part = PyMemoryView_FromObject(ends->kept);
    if (part) {
        Py_XSETREF(ends->loans[RECV], Py_NewRef(part));
        ends->lender[RECV] = ik_wait_thread();
        use(ends);
        show(ends, RECV);
    }
    return part;
}

/* End the loan: the view is released, unless somebody made an array of it, which then shows what
 * comes later. False with an exception if there is none of this thread. */
static bool take_back(ends_object *ends, int side, const char *verb) {
    if (ends->lender[side] != ik_wait_thread()) {
        PyErr_Format(PyExc_RuntimeError, "%s: this thread has nothing %s", verb,
                     side == SEND ? "reserved" : "peeked at");
        return false;
    }
    ends->lender[side] = 0;
    show_end(ends, side);
    PyObject *loan = ends->loans[side];
    ends->loans[side] = NULL;
    PyObject *none = loan ? PyObject_CallMethod(loan, "release", NULL) : NULL;
    if (!none)
        PyErr_Clear();
    Py_XDECREF(none);
    Py_XDECREF(loan);
    return true;
}

/* A kept message is in no ring. */
static void leave_loan(ends_object *ends, int side) {
    if (side == SEND || !ends->kept)
        ik_ring_leave(&ends->rings[side], side);
    unuse(ends);
}

static PyObject *ends_reserve(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *names) {
    ends_object *ends = ends_of(self);
    ik_ring *ring = &ends->rings[SEND];
    double seconds;
    int64_t len;
    if (count == 1 && !hot_integer(args[0], "size", 0, INT64_MAX, &len))
        return NULL;
    if (!read_call(ends, SEND, "reserve", args, count, 1, 1, names, &seconds))
        return NULL;
    if ((uint64_t)len > ring->largest || (uint64_t)len > ends->max_message)
        return fail(ends, -EMSGSIZE, "reserve", (uint64_t)len,
                    ring->largest < ends->max_message ? ring->largest : ends->max_message);
    show(ends, SEND); /* until commit() or cancel() */
    int rc = ik_ring_wait_room(ring, (uint64_t)len, IK_NOW);
    int64_t deadline_ns = rc == -ETIMEDOUT ? hot_deadline(seconds) : IK_NOW;
    use_waiting(ends);
    while ((rc == -ETIMEDOUT && seconds > 0) || rc == -EINTR) {
        WITHOUT_GIL(ends, rc = ik_ring_wait_room(ring, (uint64_t)len, deadline_ns));
        if (rc != -EINTR || !look_around(ends, NULL))
            break;
    }
    void *room = NULL;
    if (rc == 0 && !(room = ik_ring_reserve(ring, (uint64_t)len, &rc)))
        ik_ring_leave(ring, SEND); /* closed in this moment */
    unuse_waiting(ends);
    PyObject *part = room ? lend(ends, SEND, room, (uint64_t)len) : NULL;
    if (!part)
        show_end(ends, SEND);
    return room ? part : fail(ends, rc, "reserve", (uint64_t)len, ends->max_message);
}

static PyObject *ends_commit(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    ends_object *ends = ends_of(self);
    ik_ring *ring = &ends->rings[SEND];
    int64_t len = (int64_t)ends->loaned[SEND];
    if (count > 1)
        return PyErr_Format(PyExc_TypeError, "commit() takes one argument, not %zd", count);
    if (ends->lender[SEND] == ik_wait_thread() && count && args[0] != Py_None &&
        !hot_integer(args[0], "size", 0, len, &len))
        return NULL;
    if (!take_back(ends, SEND, "commit"))
        return NULL;
    ik_ring_stage(ring, (uint64_t)len);
    ik_ring_commit(ring, SEND);
    leave_loan(ends, SEND);
    Py_RETURN_NONE;
}

static PyObject *ends_cancel(PyObject *self, PyObject *none) {
    (void)none;
    if (!take_back(ends_of(self), SEND, "cancel"))
        return NULL;
    leave_loan(ends_of(self), SEND);
    Py_RETURN_NONE;
}

static PyObject *ends_peek(PyObject *self, PyObject *const *args, Py_ssize_t count,
                           PyObject *names) {
    ends_object *ends = ends_of(self);
    ik_ring *ring = &ends->rings[RECV];
    double seconds;
    const void *data;
    uint64_t len = 0;
    if (!read_call(ends, RECV, "peek", args, count, 0, 0, names, &seconds))
        return NULL;
    if (ends->kept)
        return lend_kept(ends);
    if (ends->pending)
        return fail(ends, -EMSGSIZE, "peek", (uint64_t)PyBytes_GET_SIZE(ends->pending),
                    ring->largest);
    show(ends, RECV); /* until release() or keep() */
    int rc = ik_ring_wait_message(ring, IK_NOW);
    int64_t deadline_ns = rc == -ETIMEDOUT ? hot_deadline(seconds) : IK_NOW;
    use_waiting(ends);
    ends->receivers++;
    while ((rc == -ETIMEDOUT && seconds > 0) || rc == -EINTR) {
        WITHOUT_GIL(ends, rc = ik_ring_wait_message(ring, deadline_ns));
        if (rc != -EINTR || !look_around(ends, "peek"))
            break;
    }
    ends->receivers--;
    if (rc == 0) {
        rc = ik_ring_look(ring, &data, &len);
        if (rc != 1)
            ik_ring_leave(ring, RECV);
        if (rc == 0)
            rc = -EMSGSIZE;
    }
    PyObject *part =
        rc == 1 ? lend(ends, RECV, data, len) : fail(ends, rc, "peek", len, ring->largest);
    if (!part)
        show_end(ends, RECV);
    unuse_waiting(ends);
    return part;
}

static PyObject *ends_release(PyObject *self, PyObject *none) {
    ends_object *ends = ends_of(self);
    (void)none;
    if (!take_back(ends, RECV, "release"))
        return NULL;
    if (!ends->kept) {
        ik_ring_step(&ends->rings[RECV], ends->loaned[RECV]);
        ik_ring_commit(&ends->rings[RECV], RECV);
    }
    leave_loan(ends, RECV);
    if (ends->kept)
        drop_kept(ends);
    if (!ends->closed)
        keep_listening(ends);
    Py_RETURN_NONE;
}

static PyObject *ends_keep(PyObject *self, PyObject *none) {
    (void)none;
    if (!take_back(ends_of(self), RECV, "keep"))
        return NULL;
    leave_loan(ends_of(self), RECV);
    Py_RETURN_NONE;
}

/* --- for asyncio: a step of a long message, and back -------------------------------------------
 */

/* (data): True if it was sent; False: wait for the bell, and come again with the same object. */
static PyObject *ends_send_some(PyObject *self, PyObject *data) {
    ends_object *ends = ends_of(self);
    Py_buffer given;
    if (!read_call(ends, SEND, "asend", NULL, 0, 0, 0, NULL, &(double){0}) ||
        !hot_buffer(data, "data", false, &given))
        return NULL;
    uint64_t len = (uint64_t)given.len;
    int rc = len > ends->max_message ? -EMSGSIZE : -EINTR;
    if (rc == -EINTR &&
        (!ends->sending || ends->sending == data)) /* no other task's is under way */
        rc = ik_ring_send(&ends->rings[SEND], &ends->progress[SEND], given.buf, len, IK_RING_STEP);
    PyBuffer_Release(&given);
    Py_XSETREF(ends->sending, ends->progress[SEND].inside && rc == -EINTR
                                  ? Py_NewRef(ends->sending ? ends->sending : data)
                                  : NULL);
    if (rc == -EINTR || rc == -EDEADLK)
        Py_RETURN_FALSE;
    if (rc < 0)
        return fail(ends, rc, "asend", len, ends->max_message);
    Py_RETURN_TRUE;
}

/* The next message, as far as it has come, which may be pending then: -EAGAIN. */
static int64_t take_step(ends_object *ends, target *into) {
    ik_ring *ring = &ends->rings[RECV];
    const void *data;
    if (!ends->pending) {
        int rc = ik_ring_enter(ring, RECV, IK_NOW);
        if (rc < 0)
            return rc;
        if (ik_ring_look(ring, &data, &into->size) != 0)
            return take(ends, into, IK_NOW);
        ends->progress[RECV] = (ik_ring_progress){0};
        if (into->size <= ends->max_message)
            ends->pending = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)into->size);
        if (!ends->pending) {
            ik_ring_leave(ring, RECV);
            return PyErr_Occurred() ? -EINTR : -EMSGSIZE;
        }
    }
    return take_pending(ends, into, IK_NOW);
}

static int64_t take_some(ends_object *ends, target *into) {
    return ends->kept ? take_kept(ends, into) : take_step(ends, into);
}

/* Take in a message, or a part of one. 1; 0: nothing is there; -1: don't wait for more. */
static int take_in(ends_object *ends) {
    target into = {0};
    uint64_t before = ends->pending ? ends->progress[RECV].done : 0;
    if (ends->receivers || (!ends->pending && ends->kept_bytes >= ends->max_inbox))
        return -1;
    int64_t rc = take_step(ends, &into);
    if (into.bytes) {
        keep_message(ends, into.bytes);
        Py_DECREF(into.bytes);
        if (ends->listening && !ends->closed)
            keep_listening(ends);
        return 1;
    }
    if (rc == -EAGAIN)
        return ends->pending && ends->progress[RECV].done != before;
    return rc == -ECONNABORTED ? 1 : -1; /* what it is, the next receive finds too */
}

static PyObject *ends_take_in(PyObject *self, PyObject *none) {
    ends_object *ends = ends_of(self);
    (void)none;
    if (!read_call(ends, RECV, "asend", NULL, 0, 0, 0, NULL, &(double){0}))
        return NULL;
    use(ends);
    int took = take_in(ends);
    unuse(ends);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(took);
}

/* The message; or wait for the bell and come again: None, or False amid a long message. */
static PyObject *ends_recv_some(PyObject *self, PyObject *none) {
    ends_object *ends = ends_of(self);
    target into = {0};
    (void)none;
    if (!read_call(ends, RECV, "arecv", NULL, 0, 0, 0, NULL, &(double){0}))
        return NULL;
    use(ends);
    int64_t rc = take_some(ends, &into);
    unuse(ends);
    if (!is_not_yet(rc) && rc != -EDEADLK && rc < 0)
        return fail(ends, rc, "arecv", into.size, ends->max_message);
    keep_listening(ends);
    return into.bytes ? into.bytes : Py_NewRef(ends->pending ? Py_False : Py_None);
}

static void abandon_sending(ends_object *ends) {
    if (ends->sending)
        ik_ring_give_up(&ends->rings[SEND], SEND, &ends->progress[SEND]);
    Py_CLEAR(ends->sending);
}

static void abandon_receiving(ends_object *ends) {
    PyObject *pending = ends->pending;
    ends->pending = NULL;
    if (pending)
        give_up_receiving(ends, PyBytes_AS_STRING(pending), (uint64_t)PyBytes_GET_SIZE(pending),
                          &ends->progress[RECV]);
    Py_XDECREF(pending);
}

/* (data): the task that was sending it was cancelled. */
static PyObject *ends_stop_sending(PyObject *self, PyObject *data) {
    if (ends_of(self)->sending == data)
        abandon_sending(ends_of(self));
    Py_RETURN_NONE;
}

static PyObject *ends_stop_receiving(PyObject *self, PyObject *none) {
    (void)none;
    abandon_receiving(ends_of(self));
    Py_RETURN_NONE;
}

/* (side): True if the bell of the side rings; else it will. */
static PyObject *ends_listen(PyObject *self, PyObject *value) {
    ends_object *ends = ends_of(self);
    int side = PyLong_AsLong(value) == RECV ? RECV : SEND;
    if (!read_call(ends, RECV, "fileno", NULL, 0, 0, 0, NULL, &(double){0}))
        return NULL;
    ends->listening |= side == RECV;
    if (side == RECV)
        return PyBool_FromLong(keep_listening(ends));
    return PyBool_FromLong(ik_ring_listen(&ends->rings[side], side));
}

/* --- the object ------------------------------------------------------------------------------ */

/* (out, in, max_message): views of the two rings. 0, or what ik_ring_attach() has against one. */
static PyObject *ends_attach(PyObject *self, PyObject *args) {
    ends_object *ends = ends_of(self);
    PyObject *views[2];
    unsigned long long max_message;
    if (!PyArg_ParseTuple(args, "O!O!K", &PyMemoryView_Type, &views[SEND], &PyMemoryView_Type,
                          &views[RECV], &max_message))
        return NULL;
    for (int side = 0; side < 2; side++) {
        Py_buffer *memory = PyMemoryView_GET_BUFFER(views[side]);
        int rc = memory->readonly
                     ? -EACCES
                     : ik_ring_attach(&ends->rings[side], memory->buf, (uint64_t)memory->len);
        if (rc < 0)
            return PyLong_FromLong(rc);
    }
    for (int side = 0; side < 2; side++)
        Py_XSETREF(ends->views[side], Py_NewRef(views[side]));
    ends->max_message = max_message;
    ends->closed = false;
    return PyLong_FromLong(0);
}

/* (data, room, their data, their room, life): the descriptors are ours from now on; -1: none. */
static PyObject *ends_set_bells(PyObject *self, PyObject *args) {
    int *bells = ends_of(self)->bells;
    ik_ring *out = &ends_of(self)->rings[SEND], *in = &ends_of(self)->rings[RECV];
    if (!PyArg_ParseTuple(args, "iiiii", &bells[DATA], &bells[ROOM], &bells[THEIR_DATA],
                          &bells[THEIR_ROOM], &bells[LIFE]))
        return NULL;
    in->ends[RECV].bell = bells[DATA];
    in->ends[SEND].bell = bells[THEIR_ROOM];
    out->ends[SEND].bell = bells[ROOM];
    out->ends[RECV].bell = bells[THEIR_DATA];
    in->life = out->life = bells[LIFE];
    Py_RETURN_NONE;
}

/* (bytes, deque): a send that waits takes in so much. The bells are set. */
static PyObject *ends_set_inbox(PyObject *self, PyObject *args) {
    unsigned long long bytes;
    PyObject *later;
    if (!PyArg_ParseTuple(args, "KO", &bytes, &later))
        return NULL;
    ends_of(self)->max_inbox = bytes;
    Py_XSETREF(ends_of(self)->later, Py_NewRef(later));
    Py_RETURN_NONE;
}

/* Messages that are kept, and that of which a part is. */
static PyObject *ends_inbox(PyObject *self, PyObject *none) {
    ends_object *ends = ends_of(self);
    (void)none;
    Py_ssize_t later = ends->later ? PyObject_Size(ends->later) : 0;
    return PyLong_FromSsize_t((ends->kept != NULL) + later + (ends->pending != NULL));
}

/* From now on, the first verb in this process calls _join(). */
static PyObject *ends_expect_use(PyObject *self, PyObject *none) {
    (void)none;
    ends_of(self)->unused = true;
    Py_RETURN_NONE;
}

/* True, and the memory stays until _unpin(); False if it is closed. */
static PyObject *ends_pin(PyObject *self, PyObject *none) {
    (void)none;
    if (ends_of(self)->closed)
        Py_RETURN_FALSE;
    use(ends_of(self));
    Py_RETURN_TRUE;
}

static PyObject *ends_unpin(PyObject *self, PyObject *pointer) {
    (void)pointer;
    unuse(ends_of(self));
    Py_RETURN_NONE;
}

/* (side): where the ring is of which this sends into, or receives from. For cffi. */
static PyObject *ends_address(PyObject *self, PyObject *side) {
    return PyLong_FromVoidPtr(&ends_of(self)->rings[PyLong_AsLong(side) == RECV ? RECV : SEND]);
}

/* What this thread has begun ends; what another one is doing ends with Closed, within a slice. */
static PyObject *ends_shut_down(PyObject *self, PyObject *none) {
    ends_object *ends = ends_of(self);
    (void)none;
    if (ends->closed)
        Py_RETURN_NONE;
    abandon_sending(ends);
    abandon_receiving(ends);
    for (int side = 0; side < 2; side++) {
        if (ends->lender[side] == ik_wait_thread() && take_back(ends, side, "close"))
            leave_loan(ends, side);
    }
    Py_CLEAR(ends->kept);
    Py_CLEAR(ends->later);
    ends->queue.doing = NULL;
    ends->queue.table = NULL;
    ends->closed = true;
    if (ends->users == 0)
        drop_views(ends);
    Py_RETURN_NONE;
}

static PyObject *ends_closed(PyObject *self, void *none) {
    (void)none;
    return PyBool_FromLong(ends_of(self)->closed);
}

static PyObject *ends_max_message(PyObject *self, void *none) {
    (void)none;
    return PyLong_FromUnsignedLongLong(ends_of(self)->max_message);
}

static PyObject *ends_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    (void)args, (void)keywords;
    PyObject *self = type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    ends_of(self)->closed = true;
    memset(ends_of(self)->bells, -1, sizeof ends_of(self)->bells);
    return self;
}

/* Another thread of ours has the lock of the end. */
static bool is_held_here(ends_object *ends, int side) {
    ik_ring_stats stats;
    if (!ends->views[side] || !ends->lender[side])
        return false;
    ik_ring_get_stats(&ends->rings[side], &stats);
    return stats.holder[side] == ends->lender[side] && ik_wait_is_our_thread(ends->lender[side]);
}

static void ends_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(ends_shut_down(self, NULL));
    /* Then the memory stays mapped: the thread's list of locks goes through it. */
    for (int side = 0; side < 2; side++)
        if (is_held_here(ends_of(self), side))
            ends_of(self)->views[side] = NULL;
    drop_views(ends_of(self)); /* the loans of other threads too */
    for (int side = 0; side < 2; side++)
        Py_CLEAR(ends_of(self)->loans[side]);
    Py_XDECREF(ends_of(self)->queue.dumps);
    Py_XDECREF(ends_of(self)->queue.loads);
    Py_XDECREF(ends_of(self)->queue.rest);
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(
    send_doc,
    "send($self, data, *, timeout=None)\n--\n\n"
    "Send one message; block while there is no room.\n\n"
    "What has returned is acknowledged: it is received once, by a receiver that lives.\n\n"
    "Args: data: bytes-like, C-contiguous, at most max_message bytes. timeout: seconds.\n"
    "Raises: OSError EMSGSIZE for a larger message, before anything is sent; TimeoutError\n"
    "    (ETIMEDOUT), and then it was not sent; BrokenPipeError (EPIPE) if the receiving side is\n"
    "    closed; PeerDied; OSError EDEADLK if this thread has reserved; Corrupt; Closed.\n"
    "Fork: usable on both sides. Threads: any number take turns.\n");

PyDoc_STRVAR(
    recv_doc,
    "recv($self, *, timeout=None)\n--\n\n"
    "Receive one message; block until there is one.\n\n"
    "Args: timeout: seconds.\n"
    "Returns: bytes.\n"
    "Raises: TimeoutError (ETIMEDOUT); EOFError if the sending side is closed and all was\n"
    "    received; PeerDied; OSError EMSGSIZE if the message is larger than max_message:\n"
    "    it stays; OSError EDEADLK if this thread peeks; Corrupt; Closed.\n"
    "Fork: usable on both sides. Threads: any number take turns.\n");

PyDoc_STRVAR(
    recv_into_doc,
    "recv_into($self, buffer, *, timeout=None)\n--\n\n"
    "As recv(), into *buffer*.\n\n"
    "Args: buffer: writable, C-contiguous.\n"
    "Returns: bytes of the message.\n"
    "Raises: as recv(); OSError EMSGSIZE if the buffer is too small: the message stays.\n");

PyDoc_STRVAR(send_many_doc,
             "send_many($self, messages, *, timeout=None)\n--\n\n"
             "Send messages in order; block while there is no room.\n\n"
             "Args: messages: any iterable of bytes-like; a list of bytes is fastest. timeout:\n"
             "    seconds for all.\n"
             "Returns: how many were sent: all, or fewer when an error or the timeout came after\n"
             "    the first.\n"
             "Raises: as send(), if none was sent; EMSGSIZE before any is, if one is too large.\n");

PyDoc_STRVAR(recv_many_doc,
             "recv_many($self, max=None, *, timeout=None)\n--\n\n"
             "Receive the messages that are ready, at least one; block until there is one.\n\n"
             "Args: max: the most to return; no more than 1024 come at once. timeout: seconds.\n"
             "Returns: a list of bytes.\n"
             "Raises: as recv(), if there was no message before the error.\n");

PyDoc_STRVAR(
    reserve_doc,
    "reserve($self, size, *, timeout=None)\n--\n\n"
    "Room for one message in the ring itself, to be filled and then sent by commit(), or not, by\n"
    "cancel(). Block while there is no room.\n\n"
    "Until then other senders wait; of a sender that dies, nothing is sent. What still uses the\n"
    "view afterwards writes into later messages.\n\n"
    "Args: size: bytes, at most half the capacity. timeout: seconds.\n"
    "Returns: a writable memoryview, aligned to 8 bytes.\n"
    "Raises: as send().\n"
    "Threads: the one that reserved commits.\n");

PyDoc_STRVAR(commit_doc, "commit($self, size=None, /)\n--\n\n"
                         "Send what was reserved, or its first *size* bytes.\n\n"
                         "Raises: RuntimeError if this thread has reserved nothing; ValueError for "
                         "more than was\n    reserved.\n");

PyDoc_STRVAR(cancel_doc, "cancel($self)\n--\n\n"
                         "Send nothing of what was reserved. Raises: RuntimeError.\n");

PyDoc_STRVAR(
    peek_doc,
    "peek($self, *, timeout=None)\n--\n\n"
    "The next message where it lies, without a copy; release() receives it, keep() does not.\n"
    "Block until there is one.\n\n"
    "Until then other receivers wait; if this process dies, the message is the next one's. A view\n"
    "that is used longer shows later messages; it never crashes.\n\n"
    "Args: timeout: seconds.\n"
    "Returns: a read-only memoryview, aligned to 8 bytes.\n"
    "Raises: as recv(); OSError EMSGSIZE for a message larger than half the capacity, which\n"
    "    recv() can receive.\n"
    "Threads: the one that peeked releases.\n");

PyDoc_STRVAR(release_doc,
             "release($self)\n--\n\n"
             "Receive the message that was peeked at. Raises: RuntimeError if this thread peeks at "
             "none.\n");

PyDoc_STRVAR(keep_doc, "keep($self)\n--\n\n"
                       "Leave the message that was peeked at for the next receive. Raises: "
                       "RuntimeError.\n");

#define FAST(name, flags, doc) {#name, (PyCFunction)(void (*)(void))ends_##name, flags, doc}

static PyMethodDef methods[] = {
    FAST(send, METH_FASTCALL | METH_KEYWORDS, send_doc),
    FAST(recv, METH_FASTCALL | METH_KEYWORDS, recv_doc),
    FAST(recv_into, METH_FASTCALL | METH_KEYWORDS, recv_into_doc),
    FAST(send_many, METH_FASTCALL | METH_KEYWORDS, send_many_doc),
    FAST(recv_many, METH_FASTCALL | METH_KEYWORDS, recv_many_doc),
    FAST(reserve, METH_FASTCALL | METH_KEYWORDS, reserve_doc),
    FAST(commit, METH_FASTCALL, commit_doc),
    FAST(cancel, METH_NOARGS, cancel_doc),
    FAST(peek, METH_FASTCALL | METH_KEYWORDS, peek_doc),
    FAST(release, METH_NOARGS, release_doc),
    FAST(keep, METH_NOARGS, keep_doc),
    {"_send_some", ends_send_some, METH_O, NULL},
    {"_recv_some", ends_recv_some, METH_NOARGS, NULL},
    {"_stop_sending", ends_stop_sending, METH_O, NULL},
    {"_stop_receiving", ends_stop_receiving, METH_NOARGS, NULL},
    {"_listen", ends_listen, METH_O, NULL},
    {"_attach", ends_attach, METH_VARARGS, NULL},
    {"_set_bells", ends_set_bells, METH_VARARGS, NULL},
    {"_set_inbox", ends_set_inbox, METH_VARARGS, NULL},
    {"_inbox", ends_inbox, METH_NOARGS, NULL},
    {"_take_in", ends_take_in, METH_NOARGS, NULL},
    {"_expect_use", ends_expect_use, METH_NOARGS, NULL},
    {"_pin", ends_pin, METH_NOARGS, NULL},
    {"_unpin", ends_unpin, METH_O, NULL},
    {"_address", ends_address, METH_O, NULL},
    {"_shut_down", ends_shut_down, METH_NOARGS, NULL},
    {0},
};

static PyGetSetDef attributes[] = {
    {"closed", ends_closed, NULL, "Was close() called here?", NULL},
    {"max_message", ends_max_message, NULL, "bytes of the largest message", NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_new, ends_new},
    {Py_tp_dealloc, ends_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {0},
};

static PyType_Spec spec = {
    .name = "ipckit._hot.Ends",
    .basicsize = sizeof(ends_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};

bool hot_add_ring(PyObject *module) {
    if (!hot_add_class(module, &spec))
        return false;
    PyObject *class = PyObject_GetAttrString(module, "Ends");
    bool added = class && hot_add_queues(module, class);
    Py_XDECREF(class);
    return added;
}

/* --- for the classes built on Ends ---------------------------------------------------------- */

hot_queue *hot_ring_queue(PyObject *self) {
    return &ends_of(self)->queue;
}

bool hot_ring_begin(PyObject *self, int side, const char *verb) {
    return can_begin(ends_of(self), side, verb);
}

int hot_ring_send(PyObject *self, const void *data, uint64_t len, double seconds) {
    return send_shown(ends_of(self), data, len, seconds);
}

PyObject *hot_ring_recv(PyObject *self, double seconds, int64_t *ret_error) {
    target into = {.to_the_end = isfinite(seconds)};
    int64_t rc = receive(ends_of(self), &into, seconds);
    *ret_error = rc;
    return rc < 0 ? NULL : into.bytes;
}

PyObject *hot_ring_recv_row(PyObject *self, const char *verb, Py_ssize_t most, double seconds) {
    return receive_shown(ends_of(self), verb, most, seconds, isfinite(seconds));
}

PyObject *hot_ring_fail(PyObject *self, int64_t rc, const char *verb, uint64_t size) {
    return fail(ends_of(self), rc, verb, size, ends_of(self)->max_message);
}
