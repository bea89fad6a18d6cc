/* SPDX-License-Identifier: MIT
 *
 * hot_arguments.c - integers, seconds and buffers, as every verb of every room takes them: one
 * answer, whether the verb is compiled or not. Python has them as ipckit._arguments.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "hot.h"

/* Seconds of which on a wait is for ever: a century. Sums with the clock stay far below 2**63. */
static const double FOR_EVER = 3.2e9;

/* Characters of a value that an error message shows. */
enum { SHOWN = 80 };

/* What a message shows of a value. Some can't be shown: an int of more digits than Python prints.
 */
static PyObject *shown(PyObject *value) {
    PyObject *text = PyObject_Repr(value);
    if (!text) {
        PyErr_Clear();
        return PyUnicode_FromFormat("an object of %s that can't be shown", Py_TYPE(value)->tp_name);
    }
    if (PyUnicode_GetLength(text) <= SHOWN)
        return text;
    PyObject *part = PyUnicode_Substring(text, 0, SHOWN);
    PyObject *cut = part ? PyUnicode_FromFormat("%U...", part) : NULL;
    Py_XDECREF(part);
    Py_DECREF(text);
    return cut;
}

/* Raise: NAME must be WANTED, not VALUE. What was raised before is forgotten. Always false. */
static bool refuse(PyObject *kind, const char *name, PyObject *value, const char *wanted) {
    PyErr_Clear();
    PyObject *text = shown(value);
    if (text)
        PyErr_Format(kind, "%s must be %s, not %U", name, wanted, text);
    Py_XDECREF(text);
    return false;
}

/* --- integers -------------------------------------------------------------------------------- */

/* numpy's too, which has an __index__ that warns. */
static bool is_boolean(PyObject *value) {
    const char *name = Py_TYPE(value)->tp_name;
    return PyBool_Check(value) || strcmp(name, "numpy.bool") == 0 ||
           strcmp(name, "numpy.bool_") == 0;
}

/* The value as an exact int; NULL with TypeError. */
static PyObject *number_of(PyObject *value, const char *name) {
    if (PyLong_CheckExact(value))
        return Py_NewRef(value);
    PyObject *number = is_boolean(value) ? NULL : PyNumber_Index(value);
    if (!number && (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_TypeError)))
        refuse(PyExc_TypeError, name, value, "an integer");
    return number;
}

/* Whether the number is in the range, each end of which may be None. -1 with an exception. */
static int is_within(PyObject *number, PyObject *least, PyObject *most) {
    int rc = least == Py_None ? 1 : PyObject_RichCompareBool(number, least, Py_GE);
    return rc == 1 && most != Py_None ? PyObject_RichCompareBool(number, most, Py_LE) : rc;
}

static bool refuse_range(PyObject *number, const char *name, PyObject *least, PyObject *most) {
    PyObject *wanted = most == Py_None
                           ? PyUnicode_FromFormat("an integer >= %S", least)
                           : PyUnicode_FromFormat("an integer from %S to %S", least, most);
    const char *text = wanted ? PyUnicode_AsUTF8(wanted) : NULL;
    if (text)
        refuse(PyExc_ValueError, name, number, text);
    Py_XDECREF(wanted);
    return false;
}

bool hot_integer(PyObject *value, const char *name, int64_t least, int64_t most,
                 int64_t *ret_number) {
    int overflow = 0;
    PyObject *number = number_of(value, name);
    if (!number)
        return false;
    *ret_number = PyLong_AsLongLongAndOverflow(number, &overflow);
    bool fits = !overflow && *ret_number >= least && *ret_number <= most;
    if (!fits) {
        PyObject *from = PyLong_FromLongLong(least), *to = PyLong_FromLongLong(most);
        if (from && to)
            refuse_range(number, name, from, to);
        Py_XDECREF(from);
        Py_XDECREF(to);
    }
    Py_DECREF(number);
    return fits;
}

/* The name of an argument, at that place, or another one. NULL with an exception. */
static const char *name_at(PyObject *const *args, Py_ssize_t count, Py_ssize_t place,
                           const char *otherwise) {
    return count > place ? PyUnicode_AsUTF8(args[place]) : otherwise;
}

static bool takes(const char *function, Py_ssize_t count, Py_ssize_t least, Py_ssize_t most) {
    if (count >= least && count <= most)
        return true;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd to %zd arguments, not %zd", function, least, most,
                 count);
    return false;
}

/* (value, name, least=None, most=None) */
static PyObject *integer(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    const char *name;
    if (!takes("integer", count, 2, 4) || !(name = name_at(args, count, 1, NULL)))
        return NULL;
    PyObject *number = number_of(args[0], name);
    PyObject *least = count > 2 ? args[2] : Py_None, *most = count > 3 ? args[3] : Py_None;
    int within = number ? is_within(number, least, most) : -1;
    if (within == 0)
        refuse_range(number, name, least, most);
    if (within != 1)
        Py_CLEAR(number);
    return number;
}

/* --- seconds --------------------------------------------------------------------------------- */

/* -1 with an exception. */
static int is_negative(PyObject *value) {
    PyObject *zero = PyLong_FromLong(0);
    int rc = zero ? PyObject_RichCompareBool(value, zero, Py_LT) : -1;
    Py_XDECREF(zero);
    return rc;
}

/* What no double holds is infinite; what is too near to 0 for one keeps its sign. */
static bool as_double(PyObject *value, const char *name, const char *wanted, double *ret_number) {
    *ret_number = PyFloat_AsDouble(value);
    bool failed = *ret_number == -1 && PyErr_Occurred();
    if (failed && PyErr_ExceptionMatches(PyExc_TypeError))
        return refuse(PyExc_TypeError, name, value, wanted);
    if (failed && PyErr_ExceptionMatches(PyExc_ValueError)) /* a signalling NaN of decimal */
        return refuse(PyExc_ValueError, name, value, wanted);
    if (failed && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return false;
    if (!failed && (*ret_number != 0 || PyLong_CheckExact(value)))
        return true;
    PyErr_Clear();
    int negative = is_negative(value);
    if (failed || negative == 1)
        *ret_number = (failed ? INFINITY : DBL_MIN) * (negative ? -1 : 1);
    return negative >= 0;
}

static bool read_seconds(PyObject *value, const char *name, const char *wanted,
                         double *ret_seconds) {
    *ret_seconds = INFINITY;
    if (value == Py_None)
        return true;
    if (PyFloat_CheckExact(value))
        *ret_seconds = PyFloat_AS_DOUBLE(value);
    else if (!as_double(value, name, wanted, ret_seconds))
        return false;
    if (*ret_seconds >= FOR_EVER)
        *ret_seconds = INFINITY;
    return isnan(*ret_seconds) ? refuse(PyExc_ValueError, name, value, wanted) : true;
}

bool hot_seconds(PyObject *value, const char *name, double *ret_seconds) {
    static const char wanted[] = "None or a number of seconds >= 0";
    if (!read_seconds(value, name, wanted, ret_seconds))
        return false;
    return *ret_seconds >= 0 ? true : refuse(PyExc_ValueError, name, value, wanted);
}

bool hot_seconds_left(PyObject *value, const char *name, double *ret_seconds) {
    if (!read_seconds(value, name, "None or a number of seconds", ret_seconds))
        return false;
    *ret_seconds = *ret_seconds < 0 ? 0 : *ret_seconds;
    return true;
}

int64_t hot_deadline(double seconds) {
    if (seconds == 0)
        return IK_NOW;
    return isinf(seconds) ? IK_FOREVER : ik_wait_now() + (int64_t)(seconds * 1e9);
}

typedef bool reader(PyObject *value, const char *name, double *ret_seconds);

/* (value, name="timeout") */
static bool read_call(const char *function, PyObject *const *args, Py_ssize_t count, reader *read,
                      double *ret_seconds) {
    const char *name = takes(function, count, 1, 2) ? name_at(args, count, 1, "timeout") : NULL;
    return name && read(args[0], name, ret_seconds);
}

static PyObject *seconds(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    double number;
    bool read = read_call("seconds", args, count, hot_seconds, &number);
    return read ? PyFloat_FromDouble(number) : NULL;
}

static PyObject *seconds_left(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    double number;
    bool read = read_call("seconds_left", args, count, hot_seconds_left, &number);
    return read ? PyFloat_FromDouble(number) : NULL;
}

static PyObject *deadline(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    double number;
    bool read = read_call("deadline", args, count, hot_seconds, &number);
    return read ? PyLong_FromLongLong(hot_deadline(number)) : NULL;
}

/* --- buffers --------------------------------------------------------------------------------- */

/* Whether a format of the module struct, or of PEP 3118, has a reference to a Python object. The
 * names of fields stand between colons. */
static bool holds_objects(const char *format) {
    bool in_name = false;
    for (; format && *format; format++) {
        in_name ^= *format == ':';
        if (*format == 'O' && !in_name)
            return true;
    }
    return false;
}

static bool refuse_objects(PyObject *object, const char *name) {
    PyErr_Format(
        PyExc_TypeError,
        "%s must be plain bytes, and this %s holds Python objects, of which other processes "
        "would see the addresses",
        name, Py_TYPE(object)->tp_name);
    return false;
}

/* Of numpy's arrays some, as those of dates, have no format; they tell by their dtype. */
static bool dtype_holds_objects(PyObject *object) {
    PyObject *dtype = PyObject_GetAttrString(object, "dtype");
    PyObject *answer = dtype ? PyObject_GetAttrString(dtype, "hasobject") : NULL;
    bool holds = answer && PyObject_IsTrue(answer) != 0;
    Py_XDECREF(dtype);
    Py_XDECREF(answer);
    PyErr_Clear();
    return holds;
}

/* What could be had without a format; else raise what is wrong with it. */
static bool get_without_format(PyObject *object, const char *name, bool writable,
                               Py_buffer *ret_view) {
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    bool usable = false, known = PyObject_GetBuffer(object, ret_view, PyBUF_INDIRECT) == 0;
    if (known && writable && ret_view->readonly)
        PyErr_Format(PyExc_TypeError, "%s must be writable, not a read-only %s", name,
                     Py_TYPE(object)->tp_name);
    else if (known && !PyBuffer_IsContiguous(ret_view, 'C'))
        PyErr_Format(PyExc_BufferError, "%s must be C-contiguous, and this %s is not", name,
                     Py_TYPE(object)->tp_name);
    else if (known && dtype_holds_objects(object))
        refuse_objects(object, name);
    else
        usable = known;
    if (known && !usable)
        PyBuffer_Release(ret_view);
    if (!known) { /* a memoryview that was released, a file that was closed: that says why */
        PyErr_Clear();
        PyErr_Restore(kind, value, trace);
    } else {
        Py_XDECREF(kind);
        Py_XDECREF(value);
        Py_XDECREF(trace);
    }
    return usable;
}

bool hot_buffer(PyObject *object, const char *name, bool writable, Py_buffer *ret_view) {
    int flags = PyBUF_ND | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (!PyObject_CheckBuffer(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be bytes-like, not %s", name,
                     Py_TYPE(object)->tp_name);
        return false;
    }
    if (PyObject_GetBuffer(object, ret_view, flags) < 0)
        return get_without_format(object, name, writable, ret_view);
    if (!holds_objects(ret_view->format))
        return true;
    PyBuffer_Release(ret_view);
    return refuse_objects(object, name);
}

/* (object, name="data", writable=False): the object. */
static PyObject *check_buffer(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Py_buffer view;
    const char *name = takes("check_buffer", count, 1, 3) ? name_at(args, count, 1, "data") : NULL;
    if (!name || !hot_buffer(args[0], name, count > 2 && args[2] == Py_True, &view))
        return NULL;
    PyBuffer_Release(&view);
    return Py_NewRef(args[0]);
}

/* (object, name="data"): its bytes, a copy unless it is bytes itself. */
static PyObject *as_bytes(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Py_buffer view;
    const char *name = takes("as_bytes", count, 1, 2) ? name_at(args, count, 1, "data") : NULL;
    if (name && PyBytes_CheckExact(args[0]))
        return Py_NewRef(args[0]);
    if (!name || !hot_buffer(args[0], name, false, &view))
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(view.buf, view.len);
    PyBuffer_Release(&view);
    return bytes;
}

/* --- for the module -------------------------------------------------------------------------- */

PyDoc_STRVAR(integer_doc,
             "integer(value, name, least=None, most=None, /)\n--\n\n"
             "The int that *value* is; *name* is the parameter, for the error.\n\n"
             "Args: value: what has ``__index__``, as int and numpy's integers; no bool. least,\n"
             "    most: the range; None for no end of it.\n"
             "Raises: TypeError for anything else; ValueError out of the range.\n");

PyDoc_STRVAR(seconds_doc,
             "seconds(value, name='timeout', /)\n--\n\n"
             "The float that *value* is; *name* is the parameter, for the error.\n\n"
             "Args: value: what has ``__float__`` or ``__index__``; None is for ever.\n"
             "Returns: inf for a century and more.\n"
             "Raises: TypeError for anything else; ValueError for nan and below 0.\n");

PyDoc_STRVAR(seconds_left_doc, "seconds_left(value, name='timeout', /)\n--\n\n"
                               "As seconds(), but below 0 is 0, as multiprocessing has it.\n");

PyDoc_STRVAR(
    deadline_doc,
    "deadline(timeout, name='timeout', /)\n--\n\n"
    "The absolute deadline in nanoseconds for *timeout* seconds from now; None and inf are\n"
    "FOREVER, 0 is NOW.\n\n"
    "Raises: as seconds().\n");

PyDoc_STRVAR(
    check_buffer_doc,
    "check_buffer(object, name='data', writable=False, /)\n--\n\n"
    "*object*, if its bytes can be passed on as they lie in memory; *name* is the parameter,\n"
    "for the error.\n\n"
    "Raises: TypeError for what is not bytes-like, holds Python objects (the format \"O\"),\n"
    "    or is read-only though *writable*; BufferError for what is not C-contiguous.\n");

PyDoc_STRVAR(as_bytes_doc,
             "as_bytes(object, name='data', /)\n--\n\n"
             "The bytes of *object*, copied unless it is bytes. Raises: as check_buffer().\n");

#define FAST(function)                                                                             \
    {#function, (PyCFunction)(void (*)(void))(function), METH_FASTCALL, function##_doc}

PyMethodDef hot_arguments[] = {
    FAST(integer),  FAST(seconds), FAST(seconds_left), FAST(deadline), FAST(check_buffer),
    FAST(as_bytes), {0},
};
