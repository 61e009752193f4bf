/* sqlbench: runs one SQLite workload in one directory, so that a plain directory and a mount can be compared.
**
** usage: sqlbench DIR WORKLOAD [SECONDS]      prints: WORKLOAD OPS_PER_SECOND P50_US P99_US
** build: cc -O2 -o sqlbench sqlbench.c -lsqlite3
**
** workload          one operation is
** ins1-wal-normal   a transaction of 1 insert, WAL, synchronous=NORMAL; also ins100-: of 100 inserts
** ins1-wal-full     the same, synchronous=FULL
** ins1-delete       the same in a rollback mode, synchronous=FULL; also -truncate, -persist
** upd1-wal-normal   an update of a random row out of 10000
** select            a row by its id, in a database of about 100 MiB; select-mmap: with mmap_size
** scan              a hundredth of reading that database whole; scan-mmap: with mmap_size
** open              opening that database, reading a row, closing it
** mixed3            one writer and three readers, a process each; two lines, reads and writes, without latencies
** lag:READDIR       an insert here until a reader of READDIR (the mount of a replica) sees it; about 200 a second at most
*/
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BIG "big.db"
#define BIG_MIB 100
#define BIG_ROWS 200000 /* at least so many, for the range of random ids */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void die(sqlite3 *db, const char *what) {
  fprintf(stderr, "sqlbench: %s: %s\n", what, db ? sqlite3_errmsg(db) : "failed");
  exit(1);
}

static void run_sql(sqlite3 *db, const char *sql) {
  if (sqlite3_exec(db, sql, 0, 0, 0) != SQLITE_OK) die(db, sql);
}

static sqlite3_stmt *prepare(sqlite3 *db, const char *sql) {
  sqlite3_stmt *stmt;
  if (sqlite3_prepare_v2(db, sql, -1, &stmt, 0) != SQLITE_OK) die(db, sql);
  return stmt;
}

/* Steps once and resets; dies unless the step ended as wanted. */
static void step(sqlite3_stmt *stmt, int want) {
  if (sqlite3_step(stmt) != want) die(sqlite3_db_handle(stmt), sqlite3_sql(stmt));
  sqlite3_reset(stmt);
}

static sqlite3 *open_db(const char *dir, const char *name) {
  char path[4096];
  sqlite3 *db;
  snprintf(path, sizeof path, "%s/%s", dir, name);
  if (sqlite3_open(path, &db) != SQLITE_OK) die(db, path);
  sqlite3_busy_timeout(db, 20000);
  return db;
}

/* ---- latencies ---- */

static double *latencies;
static size_t latency_count, latency_room;

static void record(double seconds) {
  if (latency_count == latency_room) {
    latency_room = latency_room ? latency_room * 2 : 65536;
    latencies = realloc(latencies, latency_room * sizeof *latencies);
    if (!latencies) die(0, "memory");
  }
  latencies[latency_count++] = seconds;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void report(const char *workload, double ops, double seconds) {
  double p50 = 0, p99 = 0;
  if (latency_count) {
    qsort(latencies, latency_count, sizeof *latencies, by_value);
    p50 = latencies[latency_count / 2] * 1e6;
    p99 = latencies[(size_t)((double)latency_count * .99)] * 1e6;
  }
  printf("%s %.1f %.1f %.1f\n", workload, ops / seconds, p50, p99);
}

/* ---- workloads ---- */

static const char *const FILL =
    "with recursive c(x) as (select 1 union all select x+1 from c where x<10000) "
    "insert into t(k,v) select x,randomblob(100) from c";

static void write_rows(const char *dir, const char *w, double seconds) {
  char name[64];
  snprintf(name, sizeof name, "%s-%d.db", w, (int)getpid());
  sqlite3 *db = open_db(dir, name);
  run_sql(db, strstr(w, "delete")     ? "pragma journal_mode=delete"
              : strstr(w, "truncate") ? "pragma journal_mode=truncate"
              : strstr(w, "persist")  ? "pragma journal_mode=persist"
                                      : "pragma journal_mode=wal");
  run_sql(db, strstr(w, "normal") ? "pragma synchronous=normal" : "pragma synchronous=full");
  run_sql(db, "create table t(id integer primary key, k int, v blob); create index tk on t(k)");
  int batch = strstr(w, "ins100") ? 100 : 1;
  sqlite3_stmt *stmt;
  if (!strncmp(w, "upd", 3)) {
    run_sql(db, FILL);
    stmt = prepare(db, "update t set v=randomblob(100) where id=1+abs(random())%10000");
  } else {
    stmt = prepare(db, "insert into t(k,v) values(abs(random())%100000,randomblob(100))");
  }
  double start = now(), t = start;
  long ops = 0;
  for (; t - start < seconds; ops++) {
    double before = t;
    if (batch > 1) run_sql(db, "begin");
    for (int i = 0; i < batch; i++) step(stmt, SQLITE_DONE);
    if (batch > 1) run_sql(db, "commit");
    t = now();
    record(t - before);
  }
  sqlite3_finalize(stmt);
  report(w, (double)ops, t - start);
  sqlite3_close(db);
}

/* Makes the database that the reading workloads share, or completes it. */
static void make_big(const char *dir) {
  sqlite3 *db = open_db(dir, BIG);
  run_sql(db, "pragma journal_mode=wal; pragma synchronous=off; "
              "create table if not exists big(id integer primary key, v blob)");
  sqlite3_stmt *stmt = prepare(db, "select coalesce(max(id),0) from big");
  sqlite3_step(stmt);
  long rows = (long)sqlite3_column_int64(stmt, 0);
  sqlite3_finalize(stmt);
  for (; rows < BIG_MIB * 1024L * 1024 / 420; rows += 20000)
    run_sql(db, "with recursive c(x) as (select 1 union all select x+1 from c where x<20000) "
                "insert into big(v) select randomblob(400) from c");
  run_sql(db, "pragma wal_checkpoint(truncate)");
  sqlite3_close(db);
}

static void open_and_read(const char *dir, const char *w, double seconds) {
  double start = now(), t = start;
  long ops = 0;
  for (; t - start < seconds; ops++) {
    double before = t;
    sqlite3 *db = open_db(dir, BIG);
    sqlite3_stmt *stmt = prepare(db, "select length(v) from big where id=77");
    step(stmt, SQLITE_ROW);
    sqlite3_finalize(stmt);
    sqlite3_close(db);
    t = now();
    record(t - before);
  }
  report(w, (double)ops, t - start);
}

static void read_rows(const char *dir, const char *w, double seconds) {
  int scan = !strncmp(w, "scan", 4);
  sqlite3 *db = open_db(dir, BIG);
  if (strstr(w, "mmap")) run_sql(db, "pragma mmap_size=1073741824");
  sqlite3_stmt *stmt = prepare(db, scan ? "select sum(length(v)) from big" : "select length(v) from big where id=?");
  if (scan) step(stmt, SQLITE_ROW); /* warm */
  srandom(1);
  double start = now(), t = start;
  long ops = 0;
  for (; t - start < seconds; ops++) {
    double before = t;
    if (!scan) sqlite3_bind_int64(stmt, 1, 1 + random() % BIG_ROWS);
    step(stmt, SQLITE_ROW);
    t = now();
    record(t - before);
  }
  report(w, (double)ops * (scan ? 100 : 1), t - start);
  sqlite3_finalize(stmt);
  sqlite3_close(db);
}

static void one_writer_three_readers(const char *dir, double seconds) {
  sqlite3 *db = open_db(dir, "mixed.db");
  run_sql(db, "pragma journal_mode=wal; pragma synchronous=normal; "
              "create table if not exists t(id integer primary key,k int,v blob)");
  run_sql(db, FILL);
  sqlite3_close(db);
  int pipe_ends[2];
  if (pipe(pipe_ends)) die(0, "pipe");
  for (int i = 0; i < 4; i++) {
    pid_t child = fork();
    if (child < 0) die(0, "fork");
    if (child) continue;
    db = open_db(dir, "mixed.db");
    run_sql(db, "pragma synchronous=normal");
    sqlite3_stmt *stmt = prepare(db, i ? "select v from t where id=?" : "insert into t(k,v) values(?,randomblob(100))");
    srandom((unsigned)i + 1);
    double start = now(), ops = 0;
    for (; now() - start < seconds; ops++) {
      sqlite3_bind_int64(stmt, 1, 1 + random() % 10000);
      step(stmt, i ? SQLITE_ROW : SQLITE_DONE);
    }
    double result[2] = {i, ops / (now() - start)};
    _exit(write(pipe_ends[1], result, sizeof result) != sizeof result);
  }
  close(pipe_ends[1]);
  double reads = 0, writes = 0;
  for (int i = 0; i < 4; i++) {
    double result[2];
    if (read(pipe_ends[0], result, sizeof result) != sizeof result) die(0, "mixed3: a process");
    if (result[0] == 0) writes = result[1];
    else reads += result[1];
  }
  while (wait(0) > 0) {}
  printf("mixed3-read %.1f 0 0\nmixed3-write %.1f 0 0\n", reads, writes);
}

static void lag(const char *dir, const char *read_dir, double seconds) {
  char name[64], path[4096];
  snprintf(name, sizeof name, "lag-%d.db", (int)getpid());
  snprintf(path, sizeof path, "%s/%s", read_dir, name);
  sqlite3 *db = open_db(dir, name), *replica = 0;
  run_sql(db, "pragma journal_mode=wal; pragma synchronous=normal; "
              "create table t(id integer primary key, v text); insert into t values(0,'')");
  sqlite3_stmt *newest = 0;
  for (double start = now(); !newest && now() - start < 10; usleep(1000)) {
    if (access(path, R_OK)) continue;
    replica = open_db(read_dir, name);
    if (sqlite3_prepare_v2(replica, "select max(id) from t", -1, &newest, 0) != SQLITE_OK) {
      sqlite3_close(replica);
      newest = 0;
    }
  }
  if (!newest) die(0, "the replica did not show the database in 10 s");
  sqlite3_stmt *insert = prepare(db, "insert into t values(?,'x')");
  double start = now();
  long n = 0;
  while (now() - start < seconds) {
    sqlite3_bind_int64(insert, 1, ++n);
    step(insert, SQLITE_DONE);
    double written = now();
    for (long seen = -1; seen < n;) {
      if (sqlite3_step(newest) == SQLITE_ROW) seen = (long)sqlite3_column_int64(newest, 0);
      sqlite3_reset(newest);
      if (seen < n && now() - written > 10) die(0, "the replica did not show a row in 10 s");
    }
    record(now() - written);
    usleep(3000);
  }
  report("lag", (double)n, now() - start);
}

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: sqlbench DIR WORKLOAD [SECONDS]\n");
    return 2;
  }
  const char *dir = argv[1], *w = argv[2];
  double seconds = argc > 3 ? atof(argv[3]) : 3;
  if (!strncmp(w, "ins", 3) || !strncmp(w, "upd", 3)) {
    write_rows(dir, w, seconds);
  } else if (!strncmp(w, "select", 6) || !strncmp(w, "scan", 4) || !strcmp(w, "open")) {
    char path[4096];
    snprintf(path, sizeof path, "%s/" BIG, dir);
    if (access(path, R_OK)) make_big(dir);
    if (!strcmp(w, "open")) open_and_read(dir, w, seconds);
    else read_rows(dir, w, seconds);
  } else if (!strcmp(w, "mixed3")) {
    one_writer_three_readers(dir, seconds);
  } else if (!strncmp(w, "lag:", 4)) {
    lag(dir, w + 4, seconds);
  } else {
    fprintf(stderr, "sqlbench: unknown workload %s\n", w);
    return 2;
  }
  return 0;
}
