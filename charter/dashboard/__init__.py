"""`charter dashboard`: one local page that shows what a Charter does, live, and nothing that it is shown can act.

    verb.py         the command, its address and its token
    serve.py        listening: the socket, the token, the server
    app.py          every view's URL, its JSON twin, and the one thing that changes something: a retry of dead letters
    guard.py        who may ask: Host, Origin, token, and what a page may do (its content security policy)
    desk.py         the database, asked by one at a time, briefly remembered, and never twice while its file stays the same
    log.py          how far the stages are behind on the log, looked up beside the requests
    pipeline.py, stories.py, preferences.py, training.py, letters.py, sql.py, runs.py
                    what each view shows: a function from questions to plain data, which is also its JSON twin
    page.py         that data as HTML; every text is escaped, and what cannot be seen is made visible
    charts.py, picture.py
                    SVG: charts with units and intervals, the picture of the pipeline
    templates/, static/
                    the pages (`report.html` is `charter report`'s), one style sheet, one small script

The pages work without the script; with it they stay up to date, and charts tell their figures under the pointer.
"""
