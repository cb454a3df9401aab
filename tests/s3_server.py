"""The S3 server of the tests: moto, and beside it the hands of a clock and a counter.

    s3_server.py PORT

POST /-/age?seconds=N   all objects that were written at least as long ago are a month old
GET  /-/requests        how many of each kind came since this was asked last, as JSON
GET  /-/uploads         how many uploads in parts are open
"""
import collections, datetime, json, sys, threading, urllib.parse
from moto.core.utils import utcnow
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import run_simple

requests, lock = collections.Counter(), threading.Lock()
application = DomainDispatcherApplication(create_backend_app)


def buckets():
    return [bucket for account in s3_backends.values() for bucket in account["aws"].buckets.values()]


def age(seconds):
    month, now = datetime.timedelta(days=30), utcnow()
    for bucket in buckets():
        for key in list(bucket.keys.values()):
            if now - key.last_modified >= datetime.timedelta(seconds=seconds):
                key.last_modified = now - month
    return "done"


def count(environ):
    query, method = urllib.parse.parse_qs(environ["QUERY_STRING"], keep_blank_values=True), environ["REQUEST_METHOD"]
    listing = method == "GET" and "list-type" in query
    with lock:
        requests["LIST" if listing else method] += 1


def counted():
    with lock:
        answer = json.dumps(requests)
        requests.clear()
    return answer


def serve(environ, start_response):
    path = environ["PATH_INFO"]
    if not path.startswith("/-/"):
        count(environ)
        return application(environ, start_response)
    seconds = float(urllib.parse.parse_qs(environ["QUERY_STRING"]).get("seconds", ["0"])[0])
    answers = {"/-/age": lambda: age(seconds), "/-/requests": counted,
               "/-/uploads": lambda: str(sum(len(bucket.multiparts) for bucket in buckets()))}
    answer = answers[path]().encode()
    start_response("200 OK", [("content-length", str(len(answer)))])
    return [answer]


run_simple("127.0.0.1", int(sys.argv[1]), serve, threaded=True, request_handler=MotoRequestHandler)
