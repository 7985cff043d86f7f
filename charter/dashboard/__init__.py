"""`charter dashboard`: a local web page that shows a running Charter and stays up to date.

    command.py      the CLI command and its options
    serve.py        the socket, the token and the web server
    app.py          the URL of each view, its JSON twin under /api, and the only action: retry dead letters
    security.py     checks of Host, Origin and token; the content security policy of the pages
    query_cache.py  access to the database: one query at a time, cached for as long as the file does not change
    lag_monitor.py  the consumer lag of the stages, measured by a background thread
    pipeline_view.py, traces_view.py, preferences_view.py, training_view.py, dead_letters_view.py, sql_view.py, runs_view.py
                    the data of each view: functions from query parameters to plain data, which is also the JSON twin
    rendering.py    that data as HTML: all text is escaped, invisible characters are made visible
    charts.py, pipeline_diagram.py
                    SVG: charts with units and confidence intervals, the diagram of the pipeline
    templates/, static/
                    the pages (`report.html` belongs to `charter report`), one style sheet, two small scripts

All pages work without the scripts. The scripts refresh the page, switch the theme and show the value of a chart's point on hover.
"""
