/* killpoint_impl.h - places where a crash test may kill its own process; nothing in a release. */
#pragma once
#ifdef IK_KILLPOINTS
void ik_killpoint(const char *place);
#define IK_KILLPOINT(place) ik_killpoint(place)
#else
#define IK_KILLPOINT(place) ((void)0)
#endif
