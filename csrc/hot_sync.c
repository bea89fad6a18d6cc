/* SPDX-License-Identifier: MIT
 *
 * hot_sync.c - the classes of ipckit._hot for what is in csrc/sync.h.
 *
 * The whole of a call is in C, so that no Python handler of a signal runs between its steps, but
 * only where it waits. First it is tried with the GIL held; to wait, the GIL is dropped. What takes
 * the guard of the seats of conditions and barriers might wait, and drops it from the start.
 */
#include <errno.h>

#include "hot.h"
#include "sync.h"

typedef struct {
    PyObject_HEAD Py_buffer view; /* pins the memory */
    void *shared;                 /* NULL until it is opened */
    int kind;
    ik_spin spin;
    bool recovered; /* of a lock */
    PyObject *lock; /* of a condition */
} sync_object;

static sync_object *object_of(PyObject *self) {
    return (sync_object *)self;
}

/* NULL with an exception if it was never opened. */
static void *shared_of(PyObject *self) {
    void *shared = object_of(self)->shared;
    if (!shared)
        PyErr_Format(PyExc_RuntimeError, "this %s was not initialized", Py_TYPE(self)->tp_name);
    return shared;
}

/* Not with its repr, for which a barrier is looked into. */
static PyObject *fail(PyObject *self, int rc) {
    PyObject *what = PyUnicode_FromFormat("%s at %p", Py_TYPE(self)->tp_name, self);
    if (!what)
        return NULL;
    errno = -rc;
    PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, what);
    Py_DECREF(what);
    return NULL;
}

/* Without the GIL, until it is more than a signal whose handlers are content; -EINTR: with the
 * exception of a handler. */
#define WAIT(rc, call)                                                                             \
    do {                                                                                           \
        Py_BEGIN_ALLOW_THREADS;                                                                    \
        (rc) = (call);                                                                             \
        Py_END_ALLOW_THREADS;                                                                      \
    } while ((rc) == -EINTR && PyErr_CheckSignals() == 0)

#define WITHOUT_GIL(rc, call)                                                                      \
    Py_BEGIN_ALLOW_THREADS;                                                                        \
    (rc) = (call);                                                                                 \
    Py_END_ALLOW_THREADS

/* --- arguments ------------------------------------------------------------------------------- */

static Py_ssize_t place_of(PyObject *name, const char *const *expected, Py_ssize_t most) {
    for (Py_ssize_t i = 0; i < most; i++)
        if (PyUnicode_CompareWithASCIIString(name, expected[i]) == 0)
            return i;
    return most;
}

/* Each value by place or by name; those not given stay as they are. */
static bool read_arguments(PyObject *const *args, Py_ssize_t count, PyObject *names,
                           const char *const *expected, Py_ssize_t most, PyObject **values) {
    if (count > most) {
        PyErr_Format(PyExc_TypeError, "at most %zd arguments, not %zd", most, count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        values[i] = args[i];
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++) {
        PyObject *name = PyTuple_GET_ITEM(names, i);
        Py_ssize_t place = place_of(name, expected, most);
        if (place < count || place == most) {
            PyErr_Format(PyExc_TypeError, "unexpected or second argument %R", name);
            return false;
        }
        values[place] = args[count + i];
    }
    return true;
}

/* None is for ever; below 0 is 0, as multiprocessing has it. */
static bool read_deadline(PyObject *timeout, int64_t *ret_deadline) {
    *ret_deadline = IK_FOREVER;
    if (timeout == Py_None)
        return true;
    double seconds;
    if (!hot_seconds_left(timeout, "timeout", &seconds))
        return false;
    *ret_deadline = hot_deadline(seconds);
    return true;
}

/* (block=True, timeout=None) */
static bool read_acquire(PyObject *const *args, Py_ssize_t count, PyObject *names,
                         int64_t *ret_deadline) {
    static const char *const expected[] = {"block", "timeout"};
    PyObject *values[] = {Py_True, Py_None};
    if (!read_arguments(args, count, names, expected, 2, values))
        return false;
    if (!read_deadline(values[1], ret_deadline))
        return false;
    int block = PyObject_IsTrue(values[0]);
    if (block == 0)
        *ret_deadline = IK_NOW;
    return block >= 0;
}

/* (timeout=None) */
static bool read_wait(PyObject *const *args, Py_ssize_t count, PyObject *names,
                      int64_t *ret_deadline) {
    static const char *const expected[] = {"timeout"};
    PyObject *timeout = Py_None;
    return read_arguments(args, count, names, expected, 1, &timeout) &&
           read_deadline(timeout, ret_deadline);
}

/* --- what all have --------------------------------------------------------------------------- */

/* Opened at offset of the buffer: 0, -EINVAL: not aligned; -ENOSPC: it does not fit; or as
 * ik_sync_create(), ik_sync_attach(). */
static int open_at(sync_object *object, Py_ssize_t offset, int create, unsigned number,
                   unsigned most) {
    char *memory = (char *)object->view.buf + offset;
    if (offset < 0 || object->view.len - offset < ik_sync_size(object->kind))
        return -ENOSPC;
    if ((uintptr_t)memory % IK_SYNC_ALIGNMENT)
        return -EINVAL;
    int rc = create ? ik_sync_create(memory, object->kind, number, most)
                    : ik_sync_attach(memory, object->kind);
    if (rc == 0)
        object->shared = memory;
    return rc;
}

/* (buffer, offset, kind, create, number, most): the result of C. */
static PyObject *sync_open(PyObject *self, PyObject *args) {
    sync_object *object = object_of(self);
    PyObject *buffer;
    Py_ssize_t offset;
    int kind, create;
    unsigned number, most;
    if (!PyArg_ParseTuple(args, "OnipII", &buffer, &offset, &kind, &create, &number, &most))
        return NULL;
    if (object->view.obj)
        return PyLong_FromLong(-EALREADY);
    if (!hot_buffer(buffer, "buffer", true, &object->view))
        return NULL;
    object->kind = kind;
    int rc = open_at(object, offset, create, number, most);
    if (rc < 0)
        PyBuffer_Release(&object->view);
    return PyLong_FromLong(rc);
}

static bool is_held_here(const sync_object *object) {
    bool is_lock = object->kind == IK_SYNC_LOCK || object->kind == IK_SYNC_RLOCK;
    return object->shared && is_lock && ik_wait_is_our_thread(ik_sync_lock_holder(object->shared));
}

static void sync_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    /* A lock that a thread of ours has stays mapped: the thread's list of locks goes through it. */
    if (!is_held_here(object_of(self)))
        PyBuffer_Release(&object_of(self)->view);
    Py_XDECREF(object_of(self)->lock);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *sync_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    (void)args, (void)keywords;
    return type->tp_alloc(type, 0);
}

#define WITH_KEYWORDS(function)                                                                    \
    (PyCFunction)(void (*)(void))(function), METH_FASTCALL | METH_KEYWORDS

/* --- lock ------------------------------------------------------------------------------------ */

static void note(sync_object *lock, int taken) {
    if (taken != IK_SYNC_AGAIN)
        lock->recovered = taken == IK_SYNC_RECOVERED;
}

/* This thread has it and waits for itself: the time passes, as in the standard library. */
static PyObject *acquire_own(PyObject *self, int64_t deadline_ns) {
    uint32_t never = 0;
    int rc = -ETIMEDOUT;
    if (deadline_ns == IK_FOREVER)
        return PyErr_Format(PyExc_RuntimeError, "%R is held by this very thread", self);
    if (deadline_ns != IK_NOW)
        WAIT(rc, ik_wait_word(&never, 0, deadline_ns));
    return rc == -EINTR ? NULL : Py_NewRef(Py_False);
}

static PyObject *acquire_waiting(PyObject *self, int64_t deadline_ns) {
    sync_object *lock = object_of(self);
    ik_spin spin = lock->spin;
    int rc;
    WAIT(rc, ik_sync_lock_take(lock->shared, &spin, deadline_ns));
    lock->spin = spin;
    if (rc == -EINTR)
        return NULL;
    if (rc == -ETIMEDOUT)
        return Py_NewRef(Py_False);
    if (rc < 0)
        return fail(self, rc);
    note(lock, rc);
    return Py_NewRef(Py_True);
}

static PyObject *lock_acquire(PyObject *self, PyObject *const *args, Py_ssize_t count,
                              PyObject *names) {
    ik_sync_lock *shared = shared_of(self);
    int64_t deadline_ns = IK_FOREVER;
    if (!shared || ((count || names) && !read_acquire(args, count, names, &deadline_ns)))
        return NULL;
    int rc = ik_sync_lock_take(shared, &object_of(self)->spin, IK_NOW);
    if (rc == -EDEADLK)
        return acquire_own(self, deadline_ns);
    if (rc == -ETIMEDOUT)
        return deadline_ns == IK_NOW ? Py_NewRef(Py_False) : acquire_waiting(self, deadline_ns);
    if (rc < 0)
        return fail(self, rc);
    note(object_of(self), rc);
    return Py_NewRef(Py_True);
}

static PyObject *lock_release(PyObject *self, PyObject *none) {
    (void)none;
    ik_sync_lock *shared = shared_of(self);
    if (!shared)
        return NULL;
    int rc = ik_sync_lock_release(shared);
    if (rc == -EPERM)
        return PyErr_Format(PyExc_RuntimeError, "%R can't be released by thread %d", self,
                            ik_wait_thread());
    return rc < 0 ? fail(self, rc) : Py_NewRef(Py_None);
}

static PyObject *lock_enter(PyObject *self, PyObject *none) {
    (void)none;
    return lock_acquire(self, NULL, 0, NULL);
}

static PyObject *lock_exit(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)args, (void)count;
    return lock_release(self, NULL);
}

static PyObject *lock_owner(PyObject *self, void *unused) {
    (void)unused;
    ik_sync_lock *shared = shared_of(self);
    int holder = shared ? ik_sync_lock_holder(shared) : 0;
    return !shared ? NULL : holder ? PyLong_FromLong(holder) : Py_NewRef(Py_None);
}

static PyObject *lock_recovered(PyObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(object_of(self)->recovered);
}

static PyObject *lock_recoveries(PyObject *self, void *unused) {
    (void)unused;
    ik_sync_lock *shared = shared_of(self);
    return shared ? PyLong_FromUnsignedLong(ik_sync_lock_recoveries(shared)) : NULL;
}

PyDoc_STRVAR(
    lock_acquire_doc,
    "acquire($self, block=True, timeout=None)\n--\n\n"
    "Take the lock; block while another thread of any process has it.\n\n"
    "Args: block: False for not waiting. timeout: seconds; below 0 is 0.\n"
    "Returns: True, also when the holder was killed, and then ``recovered`` is True; False if\n"
    "    the time ran out.\n"
    "Raises: RuntimeError if this thread has a Lock already, and would wait for itself for ever.\n"
    "Fork: the child does not have it. Threads: the thread that acquires is the one that\n"
    "    releases. See pthread_mutexattr_setrobust(3).\n");

PyDoc_STRVAR(
    lock_release_doc,
    "release($self)\n--\n\n"
    "Give the lock back, which wakes one that waits.\n\n"
    "Raises: RuntimeError if this thread does not have it: unlike in multiprocessing, nobody\n"
    "    else can, since the kernel must know whose death gives it back.\n");

static PyMethodDef lock_methods[] = {
    {"acquire", WITH_KEYWORDS(lock_acquire), lock_acquire_doc},
    {"release", lock_release, METH_NOARGS, lock_release_doc},
    {"__enter__", lock_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))lock_exit, METH_FASTCALL, NULL},
    {"_open", sync_open, METH_VARARGS, NULL},
    {0},
};

static PyGetSetDef lock_properties[] = {
    {"owner", lock_owner, NULL, "id of the thread that has it, as gettid(2), or None", NULL},
    {"recovered", lock_recovered, NULL,
     "Did the last acquire of this handle take the lock from a dead holder?", NULL},
    {"recoveries", lock_recoveries, NULL, "how often it was taken from the dead, by anybody", NULL},
    {0},
};

static PyType_Slot lock_slots[] = {
    {Py_tp_new, sync_new},
    {Py_tp_dealloc, sync_dealloc},
    {Py_tp_methods, lock_methods},
    {Py_tp_getset, lock_properties},
    {0},
};

/* --- event ----------------------------------------------------------------------------------- */

static PyObject *event_is_set(PyObject *self, PyObject *none) {
    (void)none;
    ik_sync_event *event = shared_of(self);
    return event ? PyBool_FromLong(ik_sync_event_is_set(event)) : NULL;
}

static PyObject *event_set(PyObject *self, PyObject *none) {
    (void)none;
    ik_sync_event *event = shared_of(self);
    if (!event)
        return NULL;
    ik_sync_event_set(event);
    return Py_NewRef(Py_None);
}

static PyObject *event_clear(PyObject *self, PyObject *none) {
    (void)none;
    ik_sync_event *event = shared_of(self);
    if (!event)
        return NULL;
    ik_sync_event_clear(event);
    return Py_NewRef(Py_None);
}

static PyObject *event_wait(PyObject *self, PyObject *const *args, Py_ssize_t count,
                            PyObject *names) {
    ik_sync_event *event = shared_of(self);
    int64_t deadline_ns = IK_FOREVER;
    if (!event || ((count || names) && !read_wait(args, count, names, &deadline_ns)))
        return NULL;
    if (ik_sync_event_is_set(event))
        return Py_NewRef(Py_True);
    ik_spin spin = object_of(self)->spin;
    uint32_t sets = ik_sync_event_sets(event);
    int rc;
    WAIT(rc, ik_sync_event_wait(event, sets, &spin, deadline_ns));
    object_of(self)->spin = spin;
    if (rc < 0 && rc != -ETIMEDOUT)
        return rc == -EINTR ? NULL : fail(self, rc);
    return PyBool_FromLong(rc == 0);
}

PyDoc_STRVAR(is_set_doc, "is_set($self)\n--\n\nIs it set? Without a system call.");
PyDoc_STRVAR(set_doc, "set($self)\n--\n\n"
                      "Set it, which wakes all that wait; a system call only if somebody does.");
PyDoc_STRVAR(clear_doc, "clear($self)\n--\n\nFrom now on, who waits waits for the next set().");
PyDoc_STRVAR(
    event_wait_doc,
    "wait($self, timeout=None)\n--\n\n"
    "Block until it is set, or was set since the call, though cleared again.\n\n"
    "Args: timeout: seconds; below 0 is 0.\n"
    "Returns: True, or False if the time ran out.\n"
    "Fork: usable on both sides. Threads: any number. Signals: their Python handlers run, then\n"
    "    the wait goes on. See futex(2).\n");

static PyMethodDef event_methods[] = {
    {"is_set", event_is_set, METH_NOARGS, is_set_doc},
    {"set", event_set, METH_NOARGS, set_doc},
    {"clear", event_clear, METH_NOARGS, clear_doc},
    {"wait", WITH_KEYWORDS(event_wait), event_wait_doc},
    {"_open", sync_open, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot event_slots[] = {
    {Py_tp_new, sync_new},
    {Py_tp_dealloc, sync_dealloc},
    {Py_tp_methods, event_methods},
    {0},
};

/* --- semaphore ------------------------------------------------------------------------------- */

static PyObject *semaphore_acquire(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                   PyObject *names) {
    ik_sync_semaphore *semaphore = shared_of(self);
    int64_t deadline_ns = IK_FOREVER;
    if (!semaphore || ((count || names) && !read_acquire(args, count, names, &deadline_ns)))
        return NULL;
    ik_spin spin = object_of(self)->spin;
    int rc = ik_sync_semaphore_take(semaphore, &spin, IK_NOW);
    if (rc == -ETIMEDOUT && deadline_ns != IK_NOW)
        WAIT(rc, ik_sync_semaphore_take(semaphore, &spin, deadline_ns));
    object_of(self)->spin = spin;
    if (rc < 0 && rc != -ETIMEDOUT)
        return rc == -EINTR ? NULL : fail(self, rc);
    return PyBool_FromLong(rc == 0);
}

static PyObject *semaphore_release(PyObject *self, PyObject *none) {
    (void)none;
    ik_sync_semaphore *semaphore = shared_of(self);
    if (!semaphore)
        return NULL;
    if (ik_sync_semaphore_release(semaphore) < 0)
        return PyErr_Format(PyExc_ValueError, "%R was released too many times", self);
    return Py_NewRef(Py_None);
}

static PyObject *semaphore_enter(PyObject *self, PyObject *none) {
    (void)none;
    return semaphore_acquire(self, NULL, 0, NULL);
}

static PyObject *semaphore_exit(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)args, (void)count;
    return semaphore_release(self, NULL);
}

static PyObject *semaphore_value(PyObject *self, PyObject *none) {
    (void)none;
    ik_sync_semaphore *semaphore = shared_of(self);
    return semaphore ? PyLong_FromUnsignedLong(ik_sync_semaphore_value(semaphore)) : NULL;
}

PyDoc_STRVAR(
    semaphore_acquire_doc,
    "acquire($self, block=True, timeout=None)\n--\n\n"
    "Take one; block while there is none.\n\n"
    "Args: block: False for not waiting. timeout: seconds; below 0 is 0.\n"
    "Returns: True, or False if the time ran out.\n"
    "Fork: usable on both sides. Threads: any number. Signals: their Python handlers run, then\n"
    "    the wait goes on. See futex(2).\n");
PyDoc_STRVAR(semaphore_release_doc,
             "release($self)\n--\n\n"
             "Add one, which wakes one that waits; anybody may.\n\n"
             "Raises: ValueError beyond the first value of a BoundedSemaphore, or 2147483647.\n");
PyDoc_STRVAR(semaphore_value_doc,
             "get_value($self)\n--\n\nHow many could be taken at this moment.");

static PyMethodDef semaphore_methods[] = {
    {"acquire", WITH_KEYWORDS(semaphore_acquire), semaphore_acquire_doc},
    {"release", semaphore_release, METH_NOARGS, semaphore_release_doc},
    {"get_value", semaphore_value, METH_NOARGS, semaphore_value_doc},
    {"__enter__", semaphore_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))semaphore_exit, METH_FASTCALL, NULL},
    {"_open", sync_open, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot semaphore_slots[] = {
    {Py_tp_new, sync_new},
    {Py_tp_dealloc, sync_dealloc},
    {Py_tp_methods, semaphore_methods},
    {0},
};

/* --- condition ------------------------------------------------------------------------------- */

/* (lock): one of the class above, opened; Python sees to that. */
static PyObject *condition_bind(PyObject *self, PyObject *lock) {
    Py_XSETREF(object_of(self)->lock, Py_NewRef(lock));
    return Py_NewRef(Py_None);
}

/* How often the calling thread has the lock of the condition; 0 with an exception. */
static uint32_t depth_of_lock(PyObject *self) {
    PyObject *lock = object_of(self)->lock;
    if (!shared_of(self))
        return 0;
    uint32_t depth = lock ? ik_sync_lock_depth(object_of(lock)->shared) : 0;
    if (!depth)
        PyErr_Format(PyExc_RuntimeError, "%R is not acquired by thread %d", self, ik_wait_thread());
    return depth;
}

/* Also when a signal handler raised: the caller has the lock, as his block will release it. */
static void take_back(sync_object *lock, uint32_t depth) {
    ik_spin spin = {0};
    int rc;
    Py_BEGIN_ALLOW_THREADS;
    do {
        rc = ik_sync_lock_take(lock->shared, &spin, IK_FOREVER);
    } while (rc == -EINTR);
    Py_END_ALLOW_THREADS;
    note(lock, rc);
    ik_sync_lock_set_depth(lock->shared, depth);
}

static PyObject *condition_wait(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                PyObject *names) {
    ik_sync_condition *condition = object_of(self)->shared;
    int64_t deadline_ns;
    uint32_t depth = depth_of_lock(self);
    if (!depth || !read_wait(args, count, names, &deadline_ns))
        return NULL;
    sync_object *lock = object_of(object_of(self)->lock);
    ik_spin spin = object_of(self)->spin;
    int seat, rc, notified;
    WITHOUT_GIL(seat, ik_sync_condition_enter(condition));
    if (seat < 0)
        return fail(self, seat);
    ik_sync_lock_set_depth(lock->shared, 1);
    ik_sync_lock_release(lock->shared);
    WAIT(rc, ik_sync_condition_sleep(condition, seat, &spin, deadline_ns));
    object_of(self)->spin = spin;
    take_back(lock, depth);
    WITHOUT_GIL(notified, ik_sync_condition_leave(condition, seat, rc == -EINTR));
    if (rc == -EINTR)
        return NULL;
    return notified < 0 ? fail(self, notified) : PyBool_FromLong(notified);
}

static PyObject *notify_up_to(PyObject *self, int64_t count) {
    int64_t rc;
    WITHOUT_GIL(rc, ik_sync_condition_notify(object_of(self)->shared, count));
    return rc < 0 ? fail(self, (int)rc) : Py_NewRef(Py_None);
}

static PyObject *condition_notify(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                  PyObject *names) {
    static const char *const expected[] = {"n"};
    PyObject *n = NULL;
    if (!depth_of_lock(self) || !read_arguments(args, count, names, expected, 1, &n))
        return NULL;
    int64_t most = 1;
    return n && !hot_integer(n, "n", INT64_MIN, INT64_MAX, &most) ? NULL : notify_up_to(self, most);
}

static PyObject *condition_notify_all(PyObject *self, PyObject *none) {
    (void)none;
    return depth_of_lock(self) ? notify_up_to(self, INT64_MAX) : NULL;
}

PyDoc_STRVAR(
    condition_wait_doc,
    "wait($self, timeout=None)\n--\n\n"
    "Release the lock, block until notified, and acquire the lock again, however often this\n"
    "thread had it.\n\n"
    "The lock is acquired in any case: after a time-out or a KeyboardInterrupt too, which then\n"
    "comes when the lock is free. Look at ``lock.recovered``: its holder may have died "
    "meanwhile.\n\n"
    "Args: timeout: seconds, for being notified; below 0 is 0.\n"
    "Returns: True, or False if the time ran out.\n"
    "Raises: RuntimeError if this thread does not have the lock; OSError EUSERS if 256 wait.\n"
    "Fork: usable on both sides. Threads: any number. See pthread_cond_wait(3).\n");
PyDoc_STRVAR(notify_doc,
             "notify($self, n=1)\n--\n\n"
             "Wake *n* of those that wait, the longest waiting first.\n\n"
             "Who is killed before he is back with the lock has not been notified: the next is.\n\n"
             "Raises: RuntimeError if this thread does not have the lock.\n");
PyDoc_STRVAR(notify_all_doc,
             "notify_all($self)\n--\n\n"
             "Wake all that wait. Raises: RuntimeError if this thread does not have the lock.\n");

static PyMethodDef condition_methods[] = {
    {"wait", WITH_KEYWORDS(condition_wait), condition_wait_doc},
    {"notify", WITH_KEYWORDS(condition_notify), notify_doc},
    {"notify_all", condition_notify_all, METH_NOARGS, notify_all_doc},
    {"_bind", condition_bind, METH_O, NULL},
    {"_open", sync_open, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot condition_slots[] = {
    {Py_tp_new, sync_new},
    {Py_tp_dealloc, sync_dealloc},
    {Py_tp_methods, condition_methods},
    {0},
};

/* --- barrier --------------------------------------------------------------------------------- */

/* The last one acts, and lets all go. */
static int act(ik_sync_barrier *barrier, PyObject *action) {
    PyObject *done = action == Py_None ? Py_NewRef(action) : PyObject_CallNoArgs(action);
    int rc;
    Py_BEGIN_ALLOW_THREADS;
    rc = done ? ik_sync_barrier_pass(barrier) : ik_sync_barrier_break(barrier);
    Py_END_ALLOW_THREADS;
    Py_XDECREF(done);
    return done ? rc : -EINTR;
}

static PyObject *index_or_none(PyObject *self, int rc, uint32_t index) {
    if (rc == 0)
        return PyLong_FromUnsignedLong(index);
    if (rc == -EPIPE || rc == -ETIMEDOUT)
        return Py_NewRef(Py_None);
    return rc == -EINTR ? NULL : fail(self, rc);
}

/* (timeout, action): the index, or None if the barrier is broken. */
static PyObject *barrier_wait(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    ik_sync_barrier *barrier = shared_of(self);
    int64_t deadline_ns;
    if (!barrier || count != 2 || !read_deadline(args[0], &deadline_ns))
        return NULL;
    ik_sync_party party;
    ik_spin spin = object_of(self)->spin;
    int rc, left;
    WAIT(rc, ik_sync_barrier_enter(barrier, &party, deadline_ns));
    if (rc < 0)
        return index_or_none(self, rc, 0);
    if (rc == 1)
        rc = act(barrier, args[1]);
    else
        WAIT(rc, ik_sync_barrier_sleep(barrier, &party, &spin, deadline_ns));
    object_of(self)->spin = spin;
    WITHOUT_GIL(left, ik_sync_barrier_leave(barrier, &party));
    return index_or_none(self, rc == 0 ? left : rc, party.index);
}

static PyObject *without_result(PyObject *self, int (*verb)(ik_sync_barrier *)) {
    ik_sync_barrier *barrier = shared_of(self);
    int rc;
    if (!barrier)
        return NULL;
    WITHOUT_GIL(rc, verb(barrier));
    return rc < 0 ? fail(self, rc) : Py_NewRef(Py_None);
}

static PyObject *barrier_abort(PyObject *self, PyObject *none) {
    (void)none;
    return without_result(self, ik_sync_barrier_break);
}

static PyObject *barrier_reset(PyObject *self, PyObject *none) {
    (void)none;
    return without_result(self, ik_sync_barrier_reset);
}

static PyObject *barrier_parties(PyObject *self, void *unused) {
    (void)unused;
    ik_sync_barrier *barrier = shared_of(self);
    return barrier ? PyLong_FromUnsignedLong(ik_sync_barrier_parties(barrier)) : NULL;
}

static PyObject *barrier_n_waiting(PyObject *self, void *unused) {
    (void)unused;
    ik_sync_barrier *barrier = shared_of(self);
    int rc;
    if (!barrier)
        return NULL;
    WITHOUT_GIL(rc, ik_sync_barrier_waiting(barrier));
    return rc < 0 ? fail(self, rc) : PyLong_FromLong(rc);
}

static PyObject *barrier_broken(PyObject *self, void *unused) {
    (void)unused;
    ik_sync_barrier *barrier = shared_of(self);
    int rc;
    if (!barrier)
        return NULL;
    WITHOUT_GIL(rc, ik_sync_barrier_is_broken(barrier));
    return rc < 0 ? fail(self, rc) : PyBool_FromLong(rc);
}

PyDoc_STRVAR(abort_doc, "abort($self)\n--\n\n"
                        "Break the barrier: BrokenBarrierError for who waits and who comes, until\n"
                        "reset(). Who has passed has passed.\n");
PyDoc_STRVAR(reset_doc, "reset($self)\n--\n\n"
                        "Empty and whole again; who waits gets BrokenBarrierError.\n");

static PyMethodDef barrier_methods[] = {
    {"_wait", (PyCFunction)(void (*)(void))barrier_wait, METH_FASTCALL, NULL},
    {"abort", barrier_abort, METH_NOARGS, abort_doc},
    {"reset", barrier_reset, METH_NOARGS, reset_doc},
    {"_open", sync_open, METH_VARARGS, NULL},
    {0},
};

static PyGetSetDef barrier_properties[] = {
    {"parties", barrier_parties, NULL, "how many must come", NULL},
    {"n_waiting", barrier_n_waiting, NULL, "how many wait for the last one", NULL},
    {"broken", barrier_broken, NULL, "Is it broken? Also by the death of one that waited.", NULL},
    {0},
};

static PyType_Slot barrier_slots[] = {
    {Py_tp_new, sync_new},
    {Py_tp_dealloc, sync_dealloc},
    {Py_tp_methods, barrier_methods},
    {Py_tp_getset, barrier_properties},
    {0},
};

/* --- for the module -------------------------------------------------------------------------- */

#define SPEC(class, its_slots)                                                                     \
    {.name = "ipckit._hot." class,                                                                 \
     .basicsize = sizeof(sync_object),                                                             \
     .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,                                            \
     .slots = its_slots}

static PyType_Spec specs[] = {
    SPEC("Lock", lock_slots),           SPEC("Event", event_slots),
    SPEC("Semaphore", semaphore_slots), SPEC("Condition", condition_slots),
    SPEC("Barrier", barrier_slots),
};

bool hot_add_sync(PyObject *module) {
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++)
        if (!hot_add_class(module, &specs[i]))
            return false;
    return true;
}
