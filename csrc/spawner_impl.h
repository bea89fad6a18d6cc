/* spawner_impl.h - what goes over the socket between us and the spawner, which are one build. */
#pragma once
#include "spawner.h"

typedef struct ik_spawner_request {
    int work;
    uint32_t size; /* of the job */
    /* The job as it lies in our memory. Its pointers mean nothing but "there is one". */
    _Alignas(16) char job[IK_SPAWNER_MOST_BYTES];
} ik_spawner_request;
